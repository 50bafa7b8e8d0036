"""What the tests share: commands, within this process or in one of their own, runs, and the repository's own sample."""

import contextlib
import gc
import io
import itertools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_model import GPTConfig, GPTModel
from gptkit.base.processes import STOP_SIGNALS
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece
from gptkit.training.checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real texts and rinna's tokenizer, where a checkout has them
SAMPLE = ROOT / "dataset" / "sample" / "sample.jsonl"
SAMPLE_TOKENIZER = ROOT / "dataset" / "sample" / "tokenizer"
SEPARATOR = "<|endoftext|>"
POEM_CONTEXT = 64
N_SHORT = 13  # documents of the sample that make 11,700 tokens in two shards

# Files about what Windows lacks: signals, terminals, limits of a process, bash, /proc, links, modes of files.
POSIX_ONLY = [
    "test_bad_input.py", "test_cli.py", "test_download.py", "test_gpu_suite.py", "test_inference.py",
    "test_parallel.py", "test_prepare.py", "test_quickstart.py", "test_refusals.py", "test_registries.py",
    "test_renting.py", "test_resume.py", "test_run_log.py", "test_signals.py", "test_strays.py", "test_streams.py",
    "test_platforms.py",
]  # fmt: skip
collect_ignore = [] if os.name == "posix" else POSIX_ONLY


def _has_links() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.symlink("nowhere", Path(folder) / "link")
        except OSError:  # on Windows it takes a privilege
            return False
    return True


HAS_LINKS = _has_links()
needs_links = pytest.mark.skipif(not HAS_LINKS, reason="no symbolic links here")
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc or /dev/full, which only Linux has")

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may need a network; huggingface_hub reads this when it is imported
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that torch cannot use would end each command (test_drivers.py)


def command(script: str, *arguments: object) -> list[str]:
    """Return the command line that runs a script of the repository, from any folder."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the variables of a command: one thread, so that two tests run side by side."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


def run_command(script: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script to its end and return it, whatever its exit code, with output as text."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=environment(), capture_output=True, encoding="utf-8", timeout=300
    )


def call_command(script: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a script as `run_command` does, but within this process: Python and torch need not start.

    This serves for what a message, an exit code or an output file shows. What only a process can show (signals, kills,
    limits, the environment, standard streams, the memory and time a command takes) needs `run_command`, and so does a
    command that replaces its process (--auto_batch).
    """
    path, code = ROOT / script, 0
    out, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with _process_state(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        patch.setattr(sys, "path", [str(path.parent), *sys.path])
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", errors)
        patch.chdir(cwd)
        threads = set(threading.enumerate())
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        _join_threads(set(threading.enumerate()) - threads)
    texts = [stream.buffer.getvalue().decode() for stream in (out, errors)]  # type: ignore[attr-defined]
    return subprocess.CompletedProcess([str(path), *map(str, arguments)], code, *texts)


@contextlib.contextmanager
def _process_state() -> Iterator[None]:
    """Give a command what a new process has: a clock of its own, one thread; restore what it changes of this process."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    n_threads, began, process_time = torch.get_num_threads(), time.process_time(), time.process_time
    torch.set_num_threads(1)  # as in environment(): bytes depend on it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "process_time", lambda: process_time() - began)
        try:
            yield
        finally:
            torch.set_num_threads(n_threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _join_threads(threads: set[threading.Thread]) -> None:
    """Wait, as a process does at its end, for the threads that a command left, such as one that writes a checkpoint."""
    left = [thread for thread in threads if not thread.daemon and thread.is_alive()]
    if left:
        gc.collect()  # the thread of an executor ends when nobody holds the executor any more
    for thread in left:
        thread.join(timeout=30)
        assert not thread.is_alive(), thread


def reset_signals() -> None:
    """Let a child process (as its preexec_fn) heed the signals that a shell has ignored in what it runs in background."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def start_process(arguments: list[str], **how: Any) -> subprocess.Popen:
    """Start a process that heeds the signals a test sends it, whatever shell runs the tests."""
    on_posix = {"preexec_fn": reset_signals} if os.name == "posix" else {}
    return subprocess.Popen(arguments, **{"env": environment(), **on_posix} | how)


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let the system refuse files over `n_bytes`, so that a write really fails (with an OSError), as on a full disk."""
    resource: Any = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def refuse(patch: pytest.MonkeyPatch, owner: Any, name: str, number: int, only: Any = lambda *_, **__: True) -> None:
    """Let a function of the system answer an error, where `only` holds for its arguments."""
    real = getattr(owner, name)

    def refused(*arguments: Any, **more: Any) -> Any:
        if only(*arguments, **more):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    patch.setattr(owner, name, refused)


def is_folder(path: Any, *_: Any) -> bool:
    """Return whether a path, or the number of an open file, is that of a folder; for `only` of refuse."""
    return os.path.isdir(path) and (isinstance(path, int) or not os.path.islink(path))


def assert_user_error(result: subprocess.CompletedProcess, *parts: str) -> None:
    """Assert that a user's mistake ended with exit code 2 and one line, no traceback, that names `parts`."""
    assert result.returncode == 2, result
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0], result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in errors[0], errors[0]


def write_jsonl(path: Path, texts: list[str], **meta: str) -> Path:
    """Write a JSONL of documents in the dataset's form and return its path."""
    path.write_text("".join(json.dumps({"text": t, "meta": meta}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    return path


@pytest.fixture(scope="session")
def sample_texts() -> list[str]:
    """Return the texts of the sample."""
    return [json.loads(line)["text"] for line in SAMPLE.read_text("utf-8").splitlines()]


TINY_MODEL = ("--n_layers", 1, "--emb_dim", 16, "--n_heads", 1, "--context_length", 16, "--batch_size", 2)
SAMPLE_TOKENS = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER)


def make_text_shards(jsonl: Path, folder: Path) -> Path:
    """Prepare a JSONL as small text shards and return their folder."""
    result = call_command(
        "dataset/prepare_aozora_jsonl.py", "--jsonl_path", jsonl, "--output_dir", folder, "--max_size_mb", 0.05
    )
    assert result.returncode == 0, result.stderr
    return folder


def make_token_shards(text_shards: Path) -> Path:
    """Make token shards by the sample's tokenizer beside the text shards, where --use_pretokenized finds them."""
    folder = text_shards.with_name(f"{text_shards.name}_pretok")
    result = call_command(
        "pretokenize.py", *SAMPLE_TOKENS, "--data_dir", text_shards, "--output_dir", folder, "--num_workers", 1
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with text shards of the sample, so small that documents are cut between them; do not change it."""
    return make_text_shards(SAMPLE, tmp_path_factory.mktemp("sample") / "001")


@pytest.fixture(scope="session")
def sample_tokens(sample_shards: Path) -> Path:
    """Return a folder with the token shards of sample_shards; do not change it."""
    return make_token_shards(sample_shards)


@pytest.fixture(scope="session")
def short_shards(tmp_path_factory: pytest.TempPathFactory, sample_texts: list[str]) -> Path:
    """Return text shards, with token shards beside them, of which an epoch of small_run takes 45 steps; do not change them."""
    folder = tmp_path_factory.mktemp("short")
    shards = make_text_shards(write_jsonl(folder / "short.jsonl", sample_texts[:N_SHORT]), folder / "001")
    make_token_shards(shards)
    return shards


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path, sample_tokens: Path) -> Path:
    """Return an experiment folder whose run, in model_checkpoints, has finished after two steps; do not change it."""
    folder = tmp_path_factory.mktemp("trained")
    output = ("--output_dir", folder / "model_checkpoints", "--max_steps", 2)
    tokens = ("--data_dir", sample_shards, "--use_pretokenized", "--device", "cpu")
    result = call_command("pretraining.py", *SAMPLE_TOKENS, *tokens, *TINY_MODEL, *output)
    assert result.returncode == 0, result.stderr
    return folder


def run_of(tmp_path: Path, shards: Path, *flags: object) -> subprocess.CompletedProcess:
    """Train for two steps."""
    output = ("--output_dir", tmp_path / "exp", "--max_steps", 2)
    return call_command(
        "pretraining.py", *SAMPLE_TOKENS, "--data_dir", shards, "--use_pretokenized", "--device", "cpu", *TINY_MODEL,
        *output, *flags,
    )  # fmt: skip


SMALL_RUN = (
    *SAMPLE_TOKENS,
    *("--use_pretokenized", "--device", "cpu"),
    *("--n_layers", 1, "--emb_dim", 32, "--n_heads", 2, "--context_length", 32, "--drop_rate", 0.1),
    *("--batch_size", 4, "--grad_accum_steps", 2, "--n_epochs", 2, "--lr", 0.003, "--eval_iter", 2),
    *("--eval_freq", 10, "--save_ckpt_freq", 30, "--print_sample_iter", 100),
)


def small_run(shards: Path, output: Path, optimizer: str, arch: str = "modern") -> tuple[object, ...]:
    """Return the arguments of a run with dropout and gradient accumulation, whose steps take a few milliseconds."""
    return (*SMALL_RUN, "--data_dir", shards, "--output_dir", output, "--optimizer", optimizer, "--arch", arch)


def newest(output: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return max(output.glob("step_*"))


def n_reported(output: Path) -> int:
    """Return the step of the last report in metrics.jsonl, 0 before the first."""
    path = output / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def curve(output: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without what depends on the clock; none before the first report."""
    path = output / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    return [{key: value for key, value in r.items() if key not in ("tokens_per_s", "elapsed_s")} for r in records]


class Clock:
    """A clock that moves only when a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


def save_experiment(folder: Path, model: GPTModel, tokenizer: Tokenizer | None = None) -> Path:
    """Write an experiment folder with that model and tokenizer (default: the sample's), and return it."""
    state = {"step": 1, "val_loss": 2.0, "identity": {"model": vars(model.config)}}
    files = (tokenizer or load_sentencepiece(str(SAMPLE_TOKENIZER))).files()
    save_checkpoint(folder / "model_checkpoints", state, model.state_dict(), {"x": torch.zeros(1)}, files)
    return folder


def untrained(n_layers: int = 1, **changes: int) -> GPTModel:
    """Return a new model for the sample's tokenizer."""
    torch.manual_seed(0)
    vocab_size = load_sentencepiece(str(SAMPLE_TOKENIZER)).vocab_size
    dimensions = {"context_length": POEM_CONTEXT, "emb_dim": 64, "n_heads": 2} | changes
    return GPTModel(GPTConfig(vocab_size, n_layers=n_layers, arch="modern", **dimensions))


@pytest.fixture(scope="session")
def poem(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return an experiment whose model continues with the one id that follows the last in a text, and what follows 春."""
    tokenizer = load_sentencepiece(str(SAMPLE_TOKENIZER))
    ids = list(dict.fromkeys(tokenizer.encode("春は花、夏𠮟祭り。\n秋になれば月を見て冬龘雪。")))
    model = untrained()  # a new model's blocks do nothing: the last product sees the last id alone
    with torch.no_grad():
        seen = torch.nn.functional.normalize(model.tok_emb.weight, dim=1)
        for now, following in itertools.pairwise([*ids, tokenizer.end_of_text_id]):
            model.out_head.weight[following] += 30 * seen[now]
    continuation = tokenizer.decode_continuation(ids[:1], ids[1:])
    assert "𠮟" in continuation
    assert "龘" in continuation
    assert "\ufffd" not in continuation
    return save_experiment(tmp_path_factory.mktemp("poem"), model), continuation


@pytest.fixture(scope="session")
def babble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an experiment whose model writes anything, also bytes that are no characters."""
    model = untrained()
    torch.nn.init.normal_(model.out_head.weight, std=0.1)
    return save_experiment(tmp_path_factory.mktemp("babble"), model)
