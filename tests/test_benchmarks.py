"""The benchmarks at tiny sizes: what they write, and that it is what they measured."""

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SAMPLE, SAMPLE_TOKENIZER, assert_user_error, call_command, command, environment

TINY = ("--n_heads", 2, "--vocab_size", 500, "--context_length", 16, "--batch_size", 2, "--device", "cpu")
# Stand-ins with the interfaces of the real ones.
NANOGPT = """
from dataclasses import dataclass
import torch

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.vocab_size % 64 == 0 and config.bias and config.dropout == 0
        self.embedding = torch.nn.Embedding(config.vocab_size, config.n_embd)
        torch.nn.init.normal_(self.embedding.weight, std=0.02)
        print("number of parameters: few")

    def forward(self, ids, targets):
        logits = self.embedding(ids) @ self.embedding.weight.T
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        assert device_type == "cpu"
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)
"""
BOOK = """
import torch

class GPTModel(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        assert cfg.keys() == {"vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "qkv_bias"}
        self.tok_emb = torch.nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.out_head = torch.nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        torch.nn.init.normal_(self.out_head.weight, std=0.02)

    def forward(self, in_idx):
        return self.out_head(self.tok_emb(in_idx))
"""


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have the benchmarks write to a folder of the test's own."""
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "results"))
    return tmp_path / "results"


def run_benchmark(script: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a benchmark that measures memory: Linux counts the process that starts a command as that command's."""
    return subprocess.run(
        command(script, *arguments), cwd=ROOT, env=environment(), capture_output=True, encoding="utf-8", timeout=300
    )


def result_of(
    run: Callable[..., subprocess.CompletedProcess], name: str, folder: Path, script: str, *arguments: object
) -> dict[str, Any]:
    """Run a benchmark and return what it wrote, which is what it printed; nothing else may have been written."""
    published = ROOT / "benchmarks" / "results"
    before = {path: path.stat().st_mtime_ns for path in published.rglob("*")}
    process = run(f"benchmarks/{script}", *arguments)
    assert process.returncode == 0, process.stderr
    assert [path.name for path in folder.iterdir()] == [f"{name}.json"]
    assert {path: path.stat().st_mtime_ns for path in published.rglob("*")} == before
    content = (folder / f"{name}.json").read_text("utf-8")
    assert process.stdout == content
    return json.loads(content)


@pytest.fixture
def nanogpt(tmp_path: Path) -> Path:
    """A checkout of nanoGPT, as far as the benchmarks use it."""
    checkout = tmp_path / "nanogpt"
    checkout.mkdir()
    (checkout / "model.py").write_text(NANOGPT)
    return checkout


@pytest.fixture
def llms_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package llms_from_scratch, as far as the benchmarks use it."""
    package = tmp_path / "packages" / "llms_from_scratch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "ch04.py").write_text(BOOK)
    monkeypatch.syspath_prepend(package.parent)
    yield
    for name in ("llms_from_scratch", "llms_from_scratch.ch04"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.usefixtures("llms_from_scratch")
def test_train_speed_times_all_contenders(results: Path, nanogpt: Path) -> None:
    flags = ("--size", "1x32", *TINY, "--n_rounds", 3, "--steps_a_round", 1, "--nanogpt_dir", nanogpt)
    found = result_of(call_command, "train_speed_500", results, "train_speed.py", *flags)
    assert found["missing"] == {}
    names = {"ours", "ours_modern_muon", "transformers", "nanogpt", "llms_from_scratch"}
    assert found["times_s"].keys() == names
    speed, ratio = found["median_tokens_per_s"], found["ours_to"]
    for name, times_s in found["times_s"].items():
        assert len(times_s) == 3
        assert speed[name] == pytest.approx(2 * 16 / statistics.median(times_s), rel=0.1)  # they are rounded
        first, last = found["losses_first_and_last"][name]
        assert first == pytest.approx(math.log(500), abs=0.2)  # all learn the same task, from a uniform guess
        assert last < first
    for name in names - {"ours"}:
        assert ratio[name] == pytest.approx(speed["ours"] / speed[name], abs=1e-3)
    assert found["goals"] == {"at least 1.1 times nanoGPT": ratio["nanogpt"] >= 1.1}
    assert {found["dtype"][name] for name in names - {"ours", "ours_modern_muon"}} == {"float32"}  # theirs on a CPU
    # GPT-2's parameters, counted by hand: embeddings, then a block's four matrices and biases, and three norms.
    block = 12 * 32 * 32 + (3 + 1 + 4 + 1) * 32 + 2 * 2 * 32
    assert found["n_parameters"]["transformers"] == (500 + 16) * 32 + block + 2 * 32
    assert found["n_parameters"]["ours"] == (512 + 16) * 32 + block + 2 * 32  # padded to a multiple of 64


def test_train_speed_gives_all_the_same_precision_when_given_one(results: Path) -> None:
    size = ("--size", "1x32", *TINY, "--n_rounds", 1, "--steps_a_round", 1)
    flags = (*size, "--dtype", "bfloat16")
    found = result_of(call_command, "train_speed_500_bfloat16", results, "train_speed.py", *flags)
    assert set(found["dtype"].values()) == {"bfloat16"}


@pytest.mark.parametrize("multiplies", [True, False])
def test_each_contender_gets_the_precision_of_its_project(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import contenders

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": multiplies}, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if multiplies else (7, 5))
    on_cpu, on_cuda = (torch.bfloat16, torch.bfloat16) if multiplies else (torch.float32, torch.float16)
    for name in ("ours", "ours_modern_muon"):
        assert contenders.dtype_as(name, "auto", torch.device("cpu")) == on_cpu
        assert contenders.dtype_as(name, "auto", torch.device("cuda")) == on_cuda
    for name in ("transformers", "nanogpt", "llms_from_scratch"):
        assert contenders.dtype_as(name, "auto", torch.device("cpu")) == torch.float32
        assert contenders.dtype_as(name, "auto", torch.device("cuda")) == on_cuda
        assert contenders.dtype_as(name, "bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "named"),
    [(("--nanogpt_dir", "none"), "none holds no model.py"), (("--size", "large"), "large"), (("--n_heads", 3), "3")],
)
def test_flags_that_train_speed_refuses(results: Path, flags: tuple[object, ...], named: str) -> None:
    result = call_command("benchmarks/train_speed.py", *flags)
    assert_user_error(result, named)
    assert named in result.stderr.splitlines()[-1]
    assert not results.exists()


@pytest.mark.slow
def test_memory_shows_that_all_logits_are_never_in_memory_at_once(results: Path) -> None:
    dimensions = ("--n_layers", 1, "--emb_dim", 16, "--n_heads", 2, "--vocab_size", 32_000, "--context_length", 128)
    logits_mib = 4 * 128 * 32_000 * 4 / 2**20
    for _ in range(3):  # a kernel that takes idle pages back between the two readings adds them to a step
        found = result_of(run_benchmark, "memory", results, "memory.py", *dimensions, "--batch_size", 4)
        memory = found["memory"]
        if memory["ours"]["step_mib"] < 2 * logits_mib:
            break
    assert memory.keys() == {"ours", "ours_modern_muon", "transformers"}
    for figures in memory.values():
        assert figures["step_mib"] == pytest.approx(figures["peak_mib"] - figures["before_mib"], abs=0.2)
    assert memory["transformers"]["step_mib"] > 2 * logits_mib  # the logits and their gradient
    assert memory["ours"]["step_mib"] < 2 * logits_mib
    assert found["goals"] == {"ours at most 70 % of transformers'": True}
    assert found["share_of_transformers"]["ours"] == pytest.approx(
        memory["ours"]["step_mib"] / memory["transformers"]["step_mib"], abs=2e-3
    )


@pytest.mark.slow
def test_ten_billion_tokens_cost_no_more_at_the_start_than_ten_million(results: Path) -> None:
    flags = ("--tokenizer_path", SAMPLE_TOKENIZER, "--n_rounds", 1)
    found = result_of(run_benchmark, "large_corpus", results, "checks/large_corpus.py", *flags)
    assert found["tokens"] == {"small": 10**7, "large": 10**10}
    assert all(found["goals"].values()), found


def test_scaling_counts_what_the_collectives_send() -> None:
    """The preset nano by hand: 2 layers x 96, feed-forward 256, vocabulary 500 padded to 512; two processes."""
    block = 4 * 96 * 96 + 3 * 96 * 256
    n_parameters = 2 * 512 * 96 + 2 * (block + 2 * 96 + 2 * 48) + 96
    flags = ("--model", "nano", "--vocab_size", 500, "--n_gpus", 2, "--batch_size", 64)
    plans = {}
    for kind in ("ddp", "fsdp"):
        process = call_command("benchmarks/calculator/scaling.py", *flags, "--parallel", kind)
        assert process.returncode == 0, process.stderr
        plans[kind] = json.loads(process.stdout)
        assert plans[kind]["model"]["parameters"] == n_parameters
    ddp, fsdp = (plans[kind]["traffic_gb_a_gpu_a_step"] for kind in plans)
    assert ddp["gradients"] == pytest.approx(4 * n_parameters / 1e9, abs=1e-5)
    assert fsdp["gradients"] == pytest.approx(ddp["gradients"] / 2, abs=1e-5)
    assert fsdp["muon"] == pytest.approx(2 * block * 4 / 2 / 1e9, abs=1e-5)
    memory = plans["ddp"]["memory_gb_a_gpu"]
    assert memory["peak"] >= memory["weights"] + memory["gradients"] + memory["optimizer"] + memory["activations"]


@pytest.mark.slow
def test_a_mount_that_refuses_nothing_keeps_a_run(results: Path, tmp_path: Path, sample_shards: Path) -> None:
    (tmp_path / "mount").mkdir()
    flags = ("--data_dir", sample_shards, "--tokenizer_path", SAMPLE_TOKENIZER, "--pause_s", 0)
    found = result_of(run_benchmark, "mounts", results, "checks/mounts.py", "--folders", tmp_path / "mount", *flags)
    assert found["mounts"]["mount"]["is_kept"], found
    assert found["mounts"]["mount"]["probe_s"] < 1
    assert all(found["goals"].values())


@pytest.mark.slow
def test_pairs_of_commands_harm_nothing(results: Path) -> None:
    kinds = (
        "prepare",
        "download",
        "train_tokenizer",
        "pretokenize",
        "report",
        "pretokenize, and prepare of other text",
    )
    flags = ("--jsonl_path", SAMPLE, "--tokenizer_path", SAMPLE_TOKENIZER, "--n_pairs", 3, "--only", *kinds)
    found = result_of(run_benchmark, "command_pairs", results, "checks/command_pairs.py", *flags)
    assert found["by_kind"].keys() == set(kinds)
    assert all(found["goals"].values()), found
