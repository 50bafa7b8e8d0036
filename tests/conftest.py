"""What the tests share: commands as real processes, and a small corpus of the repository's own sample."""

import io
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gpt_model import GPTConfig, GPTModel
from gptkit.text.tokenizer import load_sentencepiece
from gptkit.training.checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real texts and rinna's tokenizer, where a checkout has them
SAMPLE = ROOT / "dataset" / "sample" / "sample.jsonl"
SAMPLE_TOKENIZER = ROOT / "dataset" / "sample" / "tokenizer"
SEPARATOR = "<|endoftext|>"
POEM_CONTEXT = 64

Run = Callable[..., subprocess.CompletedProcess]


def command(script: str, *arguments: object) -> list[str]:
    """The command line that runs a script of the repository, from any folder."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Variables of a command: no network, one thread, so that two tests run side by side."""
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def run_command(script: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script to its end and return it, whatever its exit code, with output as text."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=environment(), capture_output=True, encoding="utf-8", timeout=300
    )


def call_command(script: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script as `run_command` does, but within this process: no start of Python and torch, no signals, no kill.

    For what a message or an exit code shows. What only a process can show (signals, kills, limits, the environment,
    standard streams, the memory and time a command takes) needs `run_command`.
    """
    path = ROOT / script
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    folder, code = Path.cwd(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", errors)
        patch.setenv("HF_HUB_OFFLINE", "1")
        try:
            os.chdir(cwd)
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        finally:
            os.chdir(folder)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    texts = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess([str(path), *map(str, arguments)], code, *texts)


def assert_user_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """A user's mistake: exit code 2, one line that begins with error:, no traceback, and it names `parts`."""
    assert result.returncode == 2, result
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0], errors[0]


def write_jsonl(path: Path, texts: list[str], **meta: str) -> Path:
    """A JSONL of works, in the dataset's form."""
    path.write_text("".join(json.dumps({"text": t, "meta": meta}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def sample_works() -> list[str]:
    return [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()]


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text shards of the sample, small enough that works are cut between them."""
    folder = tmp_path_factory.mktemp("sample") / "001"
    result = call_command(
        "dataset/prepare_aozora_jsonl.py", "--jsonl_path", SAMPLE, "--output_dir", folder, "--max_size_mb", 0.05
    )
    assert result.returncode == 0, result.stderr
    return folder


TINY_MODEL = ("--n_layers", 1, "--emb_dim", 16, "--n_heads", 1, "--context_length", 16, "--batch_size", 2)
SAMPLE_TOKENS = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)


@pytest.fixture(scope="session")
def sample_tokens(sample_shards: Path) -> Path:
    """Token shards of sample_shards by the sample's tokenizer; not to be changed."""
    folder = sample_shards.parent / "001_pretok"
    result = call_command(
        "pretokenize.py", *SAMPLE_TOKENS, "--data_dir", sample_shards, "--output_dir", folder, "--num_workers", 1
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path, sample_tokens: Path) -> Path:
    """An experiment folder whose run, in model_checkpoints, has finished after two steps; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    output = ("--output_dir", folder / "model_checkpoints", "--max_steps", 2)
    tokens = ("--data_dir", sample_shards, "--use_pretokenized", "--device", "cpu")
    result = call_command("pretraining.py", *SAMPLE_TOKENS, *tokens, *TINY_MODEL, *output)
    assert result.returncode == 0, result.stderr
    return folder


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def save_experiment(folder: Path, model: GPTModel) -> Path:
    """An experiment folder with that model, by the sample's tokenizer."""
    state = {"step": 1, "val_loss": 2.0, "identity": {"model": vars(model.config)}}
    files = load_sentencepiece(str(SAMPLE_TOKENIZER)).files()
    save_checkpoint(folder / "model_checkpoints", state, model.state_dict(), {"x": torch.zeros(1)}, files)
    return folder


def untrained(n_layers: int = 1, **changes: int) -> GPTModel:
    torch.manual_seed(0)
    vocab_size = load_sentencepiece(str(SAMPLE_TOKENIZER)).vocab_size
    dimensions = {"context_length": POEM_CONTEXT, "emb_dim": 64, "n_heads": 2} | changes
    return GPTModel(GPTConfig(vocab_size, n_layers=n_layers, arch="modern", **dimensions))


@pytest.fixture(scope="session")
def poem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An experiment whose model goes on with the one id that follows the last in a text, and what it says after 春."""
    tokenizer = load_sentencepiece(str(SAMPLE_TOKENIZER))
    ids = list(dict.fromkeys(tokenizer.encode("春は花、夏𠮟祭り。\n秋になれば月を見て冬龘雪。")))
    model = untrained()  # a new model's blocks do nothing: the last product sees the last id alone
    with torch.no_grad():
        seen = torch.nn.functional.normalize(model.tok_emb.weight, dim=1)
        for now, following in itertools.pairwise([*ids, tokenizer.end_of_text_id]):
            model.out_head.weight[following] += 30 * seen[now]
    said = tokenizer.decode_continuation(ids[:1], ids[1:])
    assert "𠮟" in said
    assert "龘" in said
    assert "\ufffd" not in said
    return save_experiment(tmp_path_factory.mktemp("poem"), model), said


@pytest.fixture(scope="session")
def babble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment whose model writes anything, bytes that are no characters too."""
    model = untrained()
    torch.nn.init.normal_(model.out_head.weight, std=0.1)
    return save_experiment(tmp_path_factory.mktemp("babble"), model)
