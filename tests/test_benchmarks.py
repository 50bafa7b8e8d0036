"""The benchmarks at tiny sizes: what they write, and that it is what they measured."""

import hashlib
import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import (
    ROOT,
    SAMPLE,
    SAMPLE_TOKENIZER,
    assert_user_error,
    call_command,
    command,
    environment,
    newest,
    run_command,
    small_run,
    write_jsonl,
)
from safetensors.torch import load_file

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
        assert config.vocab_size % 64 == 0 and (config.bias, config.dropout) in ((True, 0.0), (False, 0.2), (False, 0.0))
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
NANOCHAT = """
import os
from dataclasses import dataclass
import torch

COMPUTE_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}[os.environ["NANOCHAT_DTYPE"]]

@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_head == config.n_kv_head
        self.config = config
        self.wte = torch.nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = torch.nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_weights(self):
        for weight in self.parameters():
            torch.nn.init.normal_(weight, std=0.02)
        print("about itself")

    def num_scaling_params(self):
        matrices = 12 * self.config.n_layer * self.config.n_embd**2
        return {"transformer_matrices": matrices, "lm_head": self.lm_head.weight.numel(), "total": 0}

    def setup_optimizer(self, unembedding_lr, embedding_lr, matrix_lr, scalar_lr, weight_decay):
        adamw = dict(params=[self.wte.weight], lr=embedding_lr, kind="adamw")
        muon = dict(params=[self.lm_head.weight], lr=matrix_lr, kind="muon", weight_decay=weight_decay)
        optimizer = torch.optim.AdamW([adamw, muon])
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.wte(idx)).float()
        if targets is None:
            return logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
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
def nanochat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A checkout of nanochat, as far as the benchmarks use it."""
    checkout = tmp_path / "chat"
    (checkout / "nanochat").mkdir(parents=True)
    (checkout / "nanochat" / "__init__.py").write_text("")
    (checkout / "nanochat" / "gpt.py").write_text(NANOCHAT)
    monkeypatch.setenv("NANOCHAT_DTYPE", "")  # a benchmark sets it; this restores it
    yield checkout
    for name in ("nanochat", "nanochat.gpt"):
        sys.modules.pop(name, None)


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test import the benchmarks' modules."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


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
def test_train_speed_times_all_contenders(results: Path, nanogpt: Path, nanochat: Path) -> None:
    peers = ("--nanogpt_dir", nanogpt, "--nanochat_dir", nanochat)
    flags = ("--size", "1x32", *TINY, "--n_rounds", 3, "--steps_a_round", 1, *peers)
    found = result_of(call_command, "train_speed_500", results, "train_speed.py", *flags)
    assert found["missing"] == {}
    names = {"ours", "ours_modern_muon", "transformers", "nanogpt", "nanochat", "llms_from_scratch"}
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
    theirs = names - {"ours", "ours_modern_muon", "nanochat"}
    assert {found["dtype"][name] for name in theirs} == {"float32"}  # as they choose on a CPU
    assert found["gflop_per_s"].keys() == names - {"nanochat"}  # whose architecture is another
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
    for name in ("ours", "ours_modern_muon", "nanochat"):
        assert contenders.dtype_as(name, "auto", torch.device("cpu")) == on_cpu
        assert contenders.dtype_as(name, "auto", torch.device("cuda")) == on_cuda
    for name in ("transformers", "nanogpt", "llms_from_scratch"):
        assert contenders.dtype_as(name, "auto", torch.device("cpu")) == torch.float32
        assert contenders.dtype_as(name, "auto", torch.device("cuda")) == on_cuda
        assert contenders.dtype_as(name, "bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--nanogpt_dir", "none"), "none holds no model.py"),
        (("--nanochat_dir", "none"), "none holds no nanochat/gpt.py"),
        (("--size", "large"), "large"),
        (("--n_heads", 3), "3"),
    ],
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


def documents_of(*lengths: int) -> list[dict[str, Any]]:
    """Return documents with these lengths, whose ids are in the order of the lists of aozora.py."""
    names = sorted((f"{n:06}" for n in range(len(lengths))), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return [
        {"text": "字" * length, "meta": {"作品ID": name, "人物ID": str(i)}}
        for i, (name, length) in enumerate(zip(names, lengths, strict=True))
    ]


@pytest.mark.usefixtures("benchmark_modules")
def test_a_list_takes_documents_in_the_order_of_their_hashes_but_none_too_long(tmp_path: Path) -> None:
    from aozora_lists import describe, read_in_order, take, take_development

    documents = documents_of(10, 11, 10, 10, 45, 9, 10, 10, 10, 10, 3)
    lines = [json.dumps(document) + "\n" for document in reversed(documents)]
    (tmp_path / "corpus.jsonl").write_text("".join(lines))
    in_order = read_in_order(tmp_path / "corpus.jsonl")
    assert in_order == documents
    taken = take(in_order, 80)  # at most 10 characters each: 8 documents have 79, and the next does not fit
    assert [len(document["text"]) for document in taken] == [10, 10, 10, 9, 10, 10, 10, 10]
    assert (describe(taken).n_documents, describe(taken).n_characters) == (8, 79)
    assert describe(taken) != describe(taken[::-1])

    # The first 8 fill the list of 1 million characters, and with the next 6 that of 4 million.
    others = documents_of(*[124_900] * 8, *[500_000] * 6, 9000, 8000, 20_001, 12_000, 15_000)
    others[-1]["meta"]["人物ID"] = others[0]["meta"]["人物ID"]
    assert take_development(others, 15_000) == [others[-2], others[-4]]  # then there are more than 15,000


@pytest.mark.usefixtures("benchmark_modules")
def test_nanochats_schedules_are_those_of_its_script() -> None:
    from peers import nanochat_momentum, nanochat_rate_share

    rates = [nanochat_rate_share(step, 1000) for step in (0, 39, 40, 350, 675, 1000)]
    assert rates == pytest.approx([1 / 40, 1, 1, 1, 0.5 + 0.5 * 0.05, 0.05])
    momenta = [nanochat_momentum(step, 2000) for step in (0, 200, 400, 700, 1350, 2000)]
    assert momenta == pytest.approx([0.85, 0.91, 0.97, 0.97, 0.935, 0.90])


@pytest.mark.usefixtures("benchmark_modules")
def test_a_peer_is_scored_at_its_lowest_validation_loss_too() -> None:
    from quality import Peer, train_peer

    class Falling(torch.nn.Module):
        """A weight that falls by 1 in each step, and is the best at -5."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

    class Zeros:
        def __len__(self) -> int:
            return 1000

        def read(self, start: int, n: int) -> Any:
            return torch.zeros(n, dtype=torch.int64).numpy()

    model, steps = Falling(), []
    peer = Peer(
        settings={},
        model=model,
        loss_of_batch=lambda inputs, targets: model.weight * 1,
        validation_loss=lambda inputs, targets: (model.weight + 5).abs(),
        logits=lambda ids: ids,
        optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
        set_rates=lambda step, n_steps: steps.append((step, n_steps)),
        context_length=4,
        batch_size=2,
        grad_clip=None,
        autocast=torch.float32,
    )
    streams: Any = {"train": Zeros(), "val": Zeros()}
    figures, curve, best = train_peer(peer, streams, 1.0, torch.device("cpu"), 0, max_steps=9)
    assert (figures["steps"], figures["tokens"]) == (9, 72)
    assert steps == [(step, 9) for step in range(9)]
    assert [val_loss for _, _, val_loss in curve] == [2, 1, 0, 1, 2, 3, 4]  # after steps 3 to 9
    assert [epochs for epochs, _, _ in curve][-1] == 9 / (249 // 2)
    assert (best["weight"], model.weight) == (-5, -9)


def figures_of(end: float, best: float, last_val_loss: float, best_val_loss: float) -> dict[str, Any]:
    losses = {"last_val_loss": last_val_loss, "best_val_loss": best_val_loss}
    return {"bits_per_char": {"end": end, "best": best}, **losses, "not_averaged": losses.copy()}


@pytest.mark.usefixtures("benchmark_modules")
def test_the_variant_with_the_lowest_validation_loss_counts_and_seeds_are_averaged() -> None:
    from aozora import TRACKS, judge

    found = {
        "ours": {"auto, seed 1": figures_of(4.0, 4.0, 5.01, 5.0), "auto, seed 2": figures_of(4.2, 4.1, 5.0, 5.0)},
        "before": {"auto, seed 1": figures_of(5.0, 4.4, 9.0, 6.0)},
        "nanochat": {  # the second would have fewer bits per character
            "3x128, rates x 1, seed 1": figures_of(4.8, 4.3, 6.0, 5.5),
            "3x128, rates x 3, seed 1": figures_of(4.6, 4.2, 6.0, 5.6),
        },
    }
    result = judge(found, TRACKS["1M"])
    assert result["fewer_bits_per_char_than"]["before"] == pytest.approx({"end": 0.18, "best": 1 - 4.1 / 4.4}, abs=1e-4)
    assert result["fewer_bits_per_char_than"]["nanochat"]["best"] == pytest.approx(1 - 4.1 / 4.3, abs=1e-4)
    assert result["goals"] == {
        "the last validation loss of each run of ours, averaged or not, within 0.5 % of its best": True,
        "at least 13% fewer bits per character than before at its end": True,
        "at least 5% fewer bits per character than before at its best": True,
        "at least 5% fewer bits per character than nanochat at its best": False,
    }
    for figures in (found["ours"]["auto, seed 2"], found["ours"]["auto, seed 2"]["not_averaged"]):
        figures["last_val_loss"] = 5.03
        goals = judge(found, TRACKS["350k"])["goals"]
        assert list(goals.values()) == [False, True]
        figures["last_val_loss"] = 5.0


@pytest.mark.usefixtures("benchmark_modules")
def test_the_losses_of_ours_are_those_of_the_weights_that_are_scored() -> None:
    from quality import losses_of

    names = ("tokens", "train_loss", "val_loss", "averaged_val_loss")
    reports = [dict(zip(names, values, strict=True)) for values in ((50, 6.0, 5.0, 4.5), (100, 5.0, 5.5, 4.4))]
    found = losses_of(reports, 100)
    assert found["curve"] == [(0.5, 6.0, 4.5), (1.0, 5.0, 4.4)]
    assert (found["last_val_loss"], found["best_val_loss"]) == (4.4, 4.4)
    assert found["not_averaged"] == {"last_val_loss": 5.5, "best_val_loss": 5.0}
    for report in reports:
        del report["averaged_val_loss"]
    assert losses_of(reports, 100)["last_val_loss"] == 5.5


@pytest.mark.slow
def test_train_quality_trains_all_contenders_seed_by_seed(
    results: Path, tmp_path: Path, sample_shards: Path, nanogpt: Path, nanochat: Path
) -> None:
    flags = (
        *("--data_dir", sample_shards, *heldout_at(tmp_path), "--work_dir", tmp_path / "work", "--vocab_size", 500),
        *("--device", "cpu", "--dtype", "float32", "--max_steps", 4, "--minutes", 1, "--no-compile_peers"),
        *("--nanogpt_dir", nanogpt, "--nanogpt_sizes", "1x64", "--nanochat_dir", nanochat, "--nanochat_sizes", "1x64"),
    )
    seeds = ("--seeds", 1, 2, "--nanochat_rates", 1, 3)
    name = "train_quality_1_float32"
    found = result_of(call_command, name, results, "train_quality.py", *flags, *seeds)
    assert {contender: list(runs) for contender, runs in found["contenders"].items()} == {
        "ours": ["auto, seed 1", "auto, seed 2"],
        "nanogpt": ["1x64, seed 1", "1x64, seed 2"],
        "nanochat": [f"1x64, rates x {rate}, seed {seed}" for seed in (1, 2) for rate in (1, 3)],
    }
    assert found["dtype"] == {"ours": "float32", "nanogpt": "float32", "nanochat": "float32"}
    assert list(found["goals"]) == [
        "at least 25% fewer bits per character than nanogpt at its end",
        "at least 3% fewer bits per character than nanochat at its end",
    ]
    other = call_command("benchmarks/train_quality.py", *flags, "--contenders", "ours", "--vocab_size", 600)
    assert_user_error(other, "measured with vocab_size 500, not 600")

    for contender in found["contenders"].values():
        for figures in contender.values():
            assert figures["steps"] == 4
    (results / f"{name}.json").unlink()
    alone = (*flags, "--contenders", "ours", "--start", "not_counted")
    (run,) = result_of(call_command, f"{name}_start_not_counted", results, "train_quality.py", *alone)["contenders"][
        "ours"
    ].values()
    state = next((tmp_path / "work/ours_123").glob("step_*/state.json"))
    assert json.loads(state.read_bytes())["settings"]["budget_minutes"] > 1 + 0.5 / 60  # the start takes longer
    assert run["steps"] == 4


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--contenders", "gpt5"), "gpt5 is none of ours, nanogpt, nanochat"),
        (("--contenders", "nanochat"), "--nanochat_dir is needed"),
        (("--heldout_path", "nowhere"), "nowhere"),
        (("--contenders", "ours", "--seeds", "x"), "--seeds x"),
    ],
)
def test_flags_that_train_quality_refuses(
    results: Path, tmp_path: Path, sample_shards: Path, flags: tuple[object, ...], named: str
) -> None:
    data = ("--data_dir", sample_shards, *heldout_at(tmp_path), "--work_dir", tmp_path / "work")
    assert_user_error(call_command("benchmarks/train_quality.py", *data, *flags), named)
    assert not results.exists()
    assert not (tmp_path / "work").exists()


AOZORA = ("--track", "sample", "--jsonl_path", SAMPLE, "--vocab_size", 500, "--device", "cpu")


def heldout_at(tmp_path: Path) -> tuple[object, ...]:
    """Return the flag for a short held-out work."""
    text = "　雨の朝、駅までの道は静かだった。\n傘の列がゆっくりと橋を渡る。"
    return ("--heldout_path", write_jsonl(tmp_path / "heldout.jsonl", [text]))


@pytest.mark.slow
def test_aozora_trains_the_peers_on_a_fixed_list_and_adds_to_its_result(
    results: Path, tmp_path: Path, nanogpt: Path, nanochat: Path
) -> None:
    flags = (
        *AOZORA,
        *heldout_at(tmp_path),
        "--work_dir",
        tmp_path / "work",
        "--nanogpt_dir",
        nanogpt,
        "--nanochat_dir",
        nanochat,
    )
    sizes = ("--nanogpt_sizes", "1x64", "--nanochat_sizes", "1x64", "--nanochat_rates", 1, 3, "--no-compile_peers")
    first = result_of(
        call_command, "aozora_sample", results, "aozora.py", *flags, *sizes, "--contenders", "nanogpt", "nanochat"
    )
    assert {name: list(runs) for name, runs in first["contenders"].items()} == {
        "nanogpt": ["1x64, seed 123"],
        "nanochat": ["1x64, rates x 1, seed 123", "1x64, rates x 3, seed 123"],
    }
    for runs in first["contenders"].values():
        for figures in runs.values():
            assert figures["steps"] == 20
            assert figures["last_val_loss"] == figures["curve"][-1][2]
            assert 0 < figures["bits_per_char"]["best"] < 20  # they hardly learn in 20 steps
    slow, fast = first["contenders"]["nanochat"].values()
    assert fast["last_val_loss"] < slow["last_val_loss"] < math.log(500)
    matrices = {layers: 12 * layers * width**2 + 500 * width for layers, width in ((12, 768), (1, 64))}
    assert slow["weight_decay"] == pytest.approx(0.28 / 16 * matrices[12] / matrices[1], abs=1e-4)

    again = (*flags, "--contenders", "nanogpt", "--nanogpt_sizes", "1x64", "--seeds", 7)
    second = result_of(call_command, "aozora_sample", results, "aozora.py", *again)
    assert second["contenders"]["nanochat"] == first["contenders"]["nanochat"]
    assert list(second["contenders"]["nanogpt"]) == ["1x64, seed 123", "1x64, seed 7"]
    refused = call_command("benchmarks/aozora.py", *again, "--minutes", 3)
    assert_user_error(refused, "measured with minutes 5, not 3")

    picture = tmp_path / "curves.svg"
    drawn = call_command("benchmarks/curves.py", "--track", "sample", "--output_path", picture)
    assert drawn.returncode == 0, drawn.stderr
    elements = [element.attrib for element in ElementTree.fromstring(picture.read_text()).iter()]
    assert len([each for each in elements if each.get("class", "").startswith("curve c") and "points" in each]) == 2
    missing = call_command("benchmarks/curves.py", "--track", "1M", "--output_path", picture)
    assert_user_error(missing, "--track 1M", "aozora_1M.json")


@pytest.mark.slow
def test_aozora_compares_ours_with_an_earlier_checkout(results: Path, tmp_path: Path) -> None:
    flags = (
        *AOZORA,
        *heldout_at(tmp_path),
        "--work_dir",
        tmp_path / "work",
        "--before_dir",
        ROOT,
        "--contenders",
        "ours",
        "before",
    )
    found = result_of(call_command, "aozora_sample", results, "aozora.py", *flags)
    ours, before = (found["contenders"][name]["auto, seed 123"] for name in ("ours", "before"))
    assert ours["bits_per_char"]["end"] == pytest.approx(before["bits_per_char"]["end"], rel=0.1)  # the same project
    for figures in (ours, before):
        assert figures["steps"] == 20
        assert figures["epochs"] == figures["curve"][-1][0]
    n_tokens = json.loads((tmp_path / "work/sample/tokens_500/manifest.json").read_bytes())["train"]["tokens"]
    state = next((tmp_path / "work/sample/before_123").glob("step_*/state.json"))
    settings = json.loads(state.read_bytes())["settings"]
    assert settings["eval_freq"] == settings["save_ckpt_freq"] == n_tokens // (before["tokens"] // 20)  # an epoch
    (goal,) = found["goals"]
    assert goal == "the last validation loss of each run of ours, averaged or not, within 0.5 % of its best"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--contenders", "gpt5"), "gpt5 is none of ours, before"),
        (("--contenders", "before"), "--before_dir is needed"),
        (("--contenders", "nanogpt", "--nanogpt_dir", "none"), "none holds no model.py"),
        (("--contenders", "ours", "--development"), "either --heldout_path"),
        (("--contenders", "ours", "--seeds", "x"), "--seeds x"),
        (("--contenders", "ours", "--nanochat_rates", "0"), "--nanochat_rates 0"),
        (("--contenders", "ours", "--nanogpt_sizes", "4x100"), "4x100"),
        (("--contenders", "ours", "--track", "350k"), "the list 350k, not its 62"),
    ],
)
def test_flags_that_aozora_refuses(results: Path, tmp_path: Path, flags: tuple[object, ...], named: str) -> None:
    result = call_command(
        "benchmarks/aozora.py", *AOZORA, *heldout_at(tmp_path), "--work_dir", tmp_path / "work", *flags
    )
    assert_user_error(result, named)
    assert not results.exists()
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_what_the_compiler_gives_is_measured_in_turns(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # it takes half a minute, and tests/test_compilation.py has it
    flags = ("--sizes", "nano", "--threads", 1, "--vocab_size", 64, "--batch_tokens", 128, "--n_rounds", 1)
    (run,) = result_of(run_command, "compile_gain", results, "compile_gain.py", *flags)["runs"].values()
    eager, compiled = (run["micro_step_s"][name] for name in ("eager", "compiled"))
    assert run["times_as_fast"] == pytest.approx(eager / compiled, rel=0.1)


@pytest.mark.slow
def test_attention_is_timed_in_turns(results: Path) -> None:
    found = result_of(call_command, "attention_speed", results, "attention_speed.py", "--threads", 1, "--n_rounds", 1)
    assert len(found["ms"]) == 8
    for times in found["ms"].values():
        assert times["times as fast"] == pytest.approx(times["torch's"] / times["ours"], rel=0.05)


@pytest.mark.slow
def test_what_dropout_costs_is_measured_in_turns(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    flags = ("--size", "nano", "--threads", 1, "--vocab_size", 64, "--batch_tokens", 128, "--n_rounds", 1)
    found = result_of(run_command, "dropout_cost", results, "dropout_cost.py", *flags)["micro_step_s"]
    for eager_or_compiled in ("eager", "compiled"):
        seconds = found[eager_or_compiled]
        for kind in ("torch's", "ours"):
            ratio = seconds[f"{kind}, times as long as none"]
            assert ratio == pytest.approx(seconds[kind] / seconds["none"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name", "at_first"),
    [  # a tensor that only this form has, or has in this shape, and its values before training
        ("value embeddings", "trf_blocks.1.att.qkv.gate.weight", torch.zeros(2, 32)),
        ("scalars on residual and embedding", "trf_blocks.1.scales", torch.tensor([1.0, 0.1])),
        ("ReLU squared, not SwiGLU", "trf_blocks.1.ff.out_proj.weight", torch.zeros(32, 128)),
        ("smeared embeddings", "drop_emb.0.scale", torch.zeros(1)),
        ("bounded logits", "out_head.weight", None),
    ],
)
def test_a_model_of_another_form_learns_and_is_scored(
    form: str, name: str, at_first: torch.Tensor | None, short_shards: Path, tmp_path: Path
) -> None:
    output, text = tmp_path / "out", tmp_path / "text.txt"
    text.write_text("吾輩は猫である。名前はまだ無い。", encoding="utf-8")
    flags = (*small_run(short_shards, output, "muon"), "--n_layers", 2, "--max_steps", 20)
    trained = run_command("benchmarks/forms.py", form, "pretraining.py", *flags)
    assert trained.returncode == 0, trained.stderr
    weights = load_file(newest(output) / "model.safetensors")
    if at_first is not None:
        assert weights[name].shape == at_first.shape
        assert not torch.equal(weights[name], at_first)
    evaluation = ("evaluate_model.py", "--exp_dir", output, "--text_path", text, "--device", "cpu")
    scored = run_command("benchmarks/forms.py", form, *evaluation)
    assert scored.returncode == 0, scored.stderr
    assert 0 < json.loads(scored.stdout)["bits_per_char"] < 20
    as_qwen3 = run_command(*evaluation)
    if at_first is not None:
        assert_user_error(as_qwen3, "is damaged or from another version")
    else:  # its form is not in its tensors
        plain = call_command("pretraining.py", *flags, "--output_dir", tmp_path / "plain")
        assert plain.returncode == 0, plain.stderr
        weights_of_plain = load_file(newest(tmp_path / "plain") / "model.safetensors")
        assert not torch.equal(weights[name], weights_of_plain[name])  # it was trained with bounded logits too
        assert json.loads(as_qwen3.stdout)["bits_per_char"] != json.loads(scored.stdout)["bits_per_char"]


@pytest.mark.slow
def test_ingredients_are_compared_with_the_recipe_of_the_planner(results: Path, tmp_path: Path) -> None:
    flags = ("--track", "sample", "--jsonl_path", SAMPLE, "--work_dir", tmp_path / "work", "--vocab_size", 500)
    flags = (*flags, "--model_size", "nano", "--n_epochs", 3, "--max_steps", 4)
    name = "ingredients_sample_nano_3"
    other_form = "smeared embeddings (not Qwen3's form)"
    rows = ("--rows", "no dropout", other_form)
    first = result_of(call_command, name, results, "ingredients.py", *flags, *rows)
    assert first["more_bits_per_char_than_the_base"] == {}
    distilled, base_row = "distilled from the planner's recipe", "the planner's recipe"
    untaught = call_command("benchmarks/ingredients.py", *flags, "--rows", distilled)
    assert_user_error(untaught, "the teacher with seed 1 is missing", base_row)
    found = result_of(call_command, name, results, "ingredients.py", *flags, "--rows", distilled, base_row)
    assert list(found["rows"]) == [base_row, "no dropout", distilled, other_form]
    trained = (tmp_path / "work" / "sample").glob("ingredient_nano_3_*_1")
    forms = [path.name for path in trained if "drop_emb.0.scale" in load_file(newest(path) / "model.safetensors")]
    assert len(forms) == 1
    logs = [path.read_text("utf-8") for path in (tmp_path / "work" / "sample").glob("ingredient_nano_3_*_1.log")]
    assert sum(bool(re.search("^teacher: .*ingredient_nano_3_0_1", log, re.MULTILINE)) for log in logs) == 1
    (base,) = found["rows"]["the planner's recipe"].values()
    assert 0 < base["bits_per_char"]["averaged"] < 20
    more = found["more_bits_per_char_than_the_base"]
    (other,) = found["rows"]["no dropout"].values()
    expected = other["bits_per_char"]["averaged"] / base["bits_per_char"]["averaged"] - 1
    assert more["no dropout"] == pytest.approx(expected, abs=1e-4)
    assert found["recipe"]["lr_schedule"] == "linear"  # four steps read little of the text
    assert_user_error(call_command("benchmarks/ingredients.py", *flags, "--rows", "luck"), "luck")
    path = results / f"{name}.json"
    path.write_text(json.dumps(found | {"recipe": found["recipe"] | {"weight_decay": 9}}), "utf-8")
    changed = call_command("benchmarks/ingredients.py", *flags, "--rows", "no dropout")
    assert_user_error(changed, "the planner's recipe has changed since", str(path))
