"""Start the same command twice, or two that share a folder, at random distances: no traceback, and nothing finished is harmed.

Of two that write to one place the second waits, or is refused in one line that names the first. What they leave is
compared with what the commands leave alone, one after the other. In every third pair the first is killed by SIGKILL:
the second must end as if there had been no first. A server on this machine stands in for the hub.

    python benchmarks/checks/command_pairs.py --jsonl_path dataset/sample/sample.jsonl --tokenizer_path dataset/sample/tokenizer
"""

import gzip
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import log, read_texts, script, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path

MODEL = {
    "n_layers": 1, "emb_dim": 16, "n_heads": 1, "context_length": 16, "batch_size": 2, "device": "cpu",
}  # fmt: skip
SHARD_MB = 0.02  # so that the sample makes some
ARCHIVE = gzip.compress(random.Random(0).randbytes(24_000_000), compresslevel=0, mtime=0)  # three writes of the client
ARCHIVE_NAME = "aozorabunko-dedupe-clean.jsonl.gz"
SEND_S = 0.5  # how long the server takes for it
DATES = re.compile(rb"20\d\d[-/]?\d\d[-/]?\d\d[T ]?\d\d:\d\d(:\d\d)?")
KILL_EVERY = 3


@dataclass(frozen=True, kw_only=True)
class CommandPairsConfig:
    """Start pairs of commands at random distances, and compare what they leave."""

    jsonl_path: str = setting(help="a small corpus")
    tokenizer_path: str = setting(help="a SentencePiece model")
    n_pairs: int = setting(20, "pairs of each command (a quarter of two different ones)", at_least=3)
    only: tuple[str, ...] = setting((), "names of the kinds to try (default: all)")
    seed: int = setting(0, "seed of the distances")


@dataclass(frozen=True)
class Pair:
    """Two commands that run in a folder `work` at the same time, and what has to be there before."""

    first: list[str]
    second: list[str]
    setup: Callable[[Path], None] = lambda work: None
    is_settled: bool = (
        True  # whether any order of the two leaves the same; else they are run again before the comparison
    )


def main(config: CommandPairsConfig) -> None:
    jsonl = existing_path(config.jsonl_path, "--jsonl_path").resolve()
    tokenizer_path = existing_path(config.tokenizer_path, "--tokenizer_path").resolve()
    draw = random.Random(config.seed)
    with tempfile.TemporaryDirectory() as folder, ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        variables = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": f"{folder}/hf_home",
            "HF_HUB_OFFLINE": "0",
        }
        environment = os.environ | variables | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_XET": "1"}
        kinds = make_kinds(Path(folder), jsonl, tokenizer_path, environment)
        found = {
            name: try_pairs(pair, Path(folder, "work"), n_pairs_of(pair, config.n_pairs), draw, environment, name)
            for name, pair in kinds.items()
            if name in (config.only or kinds)
        }
        hub.shutdown()
    result = {
        "pairs_of_each_command": config.n_pairs,
        "by_kind": found,
        "goals": {
            "never a traceback": not any(each["tracebacks"] for each in found.values()),
            "a refusal is one line that names the other command, with exit code 2": not any(
                each["unclear"] for each in found.values()
            ),
            "nothing is harmed": not any(each["harmed"] for each in found.values()),
        },
    }
    write_result("command_pairs", result)


def n_pairs_of(pair: Pair, n_pairs: int) -> int:
    """Return how many pairs of a kind to try: fewer of two different commands, each of which takes many runs."""
    return n_pairs if pair.is_settled else max(n_pairs // 4, 3)


def make_kinds(folder: Path, jsonl: Path, tokenizer_path: Path, environment: dict[str, str]) -> dict[str, Pair]:
    """Make what the pairs start from, and return the pairs by name. Their paths are relative to the folder `work`."""
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps({"text": text}) + "\n" for text in read_texts(jsonl)[::2]), "utf-8")
    tokenizer = {"tokenizer": "sentencepiece", "tokenizer_path": tokenizer_path}

    def prepare(source: Path, output: Path | str) -> list[str]:
        flags = {"jsonl_path": source, "output_dir": output, "max_size_mb": SHARD_MB}
        return script("dataset/prepare_aozora_jsonl.py", **flags)

    def pretokenize(data_dir: Path | str, output: Path | str, **more: object) -> list[str]:
        return script("pretokenize.py", data_dir=data_dir, output_dir=output, num_workers=1, **tokenizer, **more)

    def train(output: Path | str, **more: object) -> list[str]:
        flags = {"data_dir": text, "pretokenized_dir": "tokens", "output_dir": output, "max_steps": 3, "eval_freq": 2}
        return [*script("pretraining.py", **{**flags, **tokenizer, **MODEL, **more}), "--use_pretokenized"]

    text, experiment = folder / "text", folder / "experiment"
    run(prepare(jsonl, text), folder, environment)
    run(train(experiment), folder, environment)
    download = script("dataset/download_aozora.py", output_dir="data")
    train_tokenizer = script("dataset/train_tokenizer.py", data_dir=text, output_dir="tokenizer", vocab_size=600)
    export = script("export_hf.py", exp_dir=experiment, output_dir="hf")
    report = script("report.py", exp_dir=experiment, output="report.html")

    saving = train("run", max_steps=30, save_ckpt_freq=1, eval_freq=100)
    run(train("run", max_steps=1, save_ckpt_freq=1), folder, environment)

    return {
        "prepare": Pair(prepare(jsonl, "out"), prepare(jsonl, "out")),
        "download": Pair(download, download),
        "train_tokenizer": Pair(train_tokenizer, train_tokenizer),
        "pretokenize": Pair(pretokenize(text, "tokens"), pretokenize(text, "tokens")),
        "pretraining, tokens not made yet": Pair(train("a"), train("b")),
        "pretraining, the same output folder": Pair(train("a"), train("a"), copy(folder / "tokens")),
        "export": Pair(export, export),
        "report": Pair(report, report),
        "pretokenize, and prepare of other text": Pair(
            pretokenize("text", "tokens"), prepare(other, "text"), copy(text), is_settled=False
        ),
        "train_tokenizer, and prepare of other text": Pair(
            script("dataset/train_tokenizer.py", data_dir="text", output_dir="tokenizer", vocab_size=600),
            prepare(other, "text"), copy(text), is_settled=False,
        ),
        "pretraining, and pretokenize of its tokens with another split": Pair(
            train("a", max_steps=200), pretokenize(text, "tokens", val_fraction=0.3), copy(folder / "tokens"), is_settled=False
        ),
        "pretraining that saves each step, and export": Pair(
            saving, script("export_hf.py", exp_dir="run", output_dir="hf"), copy(folder / "tokens", folder / "run"), is_settled=False
        ),
    }  # fmt: skip


def copy(*folders: Path) -> Callable[[Path], None]:
    """Return a setup that copies these folders into the folder `work`."""

    def setup(work: Path) -> None:
        for folder in folders:
            shutil.copytree(folder, work / folder.name, symlinks=True)

    return setup


def try_pairs(
    pair: Pair, work: Path, n_pairs: int, draw: random.Random, environment: dict[str, str], name: str
) -> dict[str, Any]:
    """Run the pairs of one kind; return how they ended, and how many left something else than the commands alone."""
    began = time.monotonic()
    expected = alone(pair, work, environment)
    alone_s = (time.monotonic() - began) / 2
    counts: Counter[str] = Counter()
    for number in range(n_pairs):
        renew(work, pair)
        is_killed = number % KILL_EVERY == KILL_EVERY - 1
        ends = run_pair(pair, work, draw, alone_s, environment, is_killed)
        for code, errors in ends:
            last = errors.strip().rpartition("\n")[2]
            counts["tracebacks"] += "Traceback" in errors
            counts["waited"] += "waiting for process" in errors
            counts["refused"] += code == 2
            is_clear = code == 0 or (code == 2 and last.startswith("error: ") and errors.count("error: ") == 1)
            names_other = pair.first != pair.second or "process " in last
            counts["unclear"] += not (is_clear and (code == 0 or names_other))
            if not is_clear:
                log(f"{name}: exit code {code}: {errors[-2000:]}")
        counts["killed"] += is_killed
        if is_killed or not pair.is_settled:
            found = outcome(alone_again(pair, work, environment), with_hidden=False)
            is_same = found == without_hidden(expected)
        else:
            found = outcome(work, with_hidden=True)
            is_same = found == expected
        counts["harmed"] += not is_same
        if not is_same:
            differing = sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
            log(f"{name}: harmed: {differing}")
    names = ("killed", "waited", "refused", "tracebacks", "unclear", "harmed")
    log(f"{name}: {dict(counts)}")
    return {"pairs": n_pairs, "alone_s": round(alone_s, 2), **{key: counts[key] for key in names}}


def run_pair(
    pair: Pair, work: Path, draw: random.Random, alone_s: float, environment: dict[str, str], is_killed: bool
) -> list[tuple[int, str]]:
    """Start both at a random distance; return the exit code and standard error of each that was not killed."""
    how: dict[str, Any] = {"cwd": work, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    first = subprocess.Popen(pair.first, **how)
    time.sleep(draw.uniform(0, alone_s))
    second = subprocess.Popen(pair.second, **how)
    if is_killed:
        time.sleep(draw.uniform(0, alone_s / 2))
        first.kill()
    # The second's few lines fit into the pipe while the first is read.
    ends = [(process, process.communicate()[1].decode()) for process in (first, second)]
    return [(process.returncode, errors) for process, errors in ends if process.returncode != -9]


def renew(work: Path, pair: Pair) -> None:
    """Make the folder anew."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    pair.setup(work)


def alone(pair: Pair, work: Path, environment: dict[str, str]) -> dict[str, str]:
    """Run the two commands one after the other; return what they leave."""
    renew(work, pair)
    return outcome(alone_again(pair, work, environment), with_hidden=True)


def alone_again(pair: Pair, work: Path, environment: dict[str, str]) -> Path:
    """Run the two commands one after the other, where they may have run before; return the folder."""
    for command in (pair.first, pair.second) if pair.is_settled else (pair.second, pair.first, pair.second):
        run(command, work, environment)
    return work


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command to its end. Raises RuntimeError where it fails."""
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
    if process.returncode:
        raise RuntimeError(f"{command}: exit code {process.returncode}: {process.stderr[-2000:]}")


def outcome(work: Path, *, with_hidden: bool) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, but for records of times; a page is read without its dates.

    Hidden files are locks and temporary files: only who was killed may leave one.
    """
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_dir() or path.name in ("metrics.jsonl", "sessions.jsonl", "config.json", "loss_curve.png"):
            continue
        if path.name in ("state.json", "SHA256SUMS", "run.log"):  # with the seconds that a run took
            continue
        found[name] = hashlib.sha256(DATES.sub(b"", path.read_bytes())).hexdigest()
    return found if with_hidden else without_hidden(found)


def without_hidden(found: dict[str, str]) -> dict[str, str]:
    """Return what an outcome has but for hidden files, and those in hidden folders."""
    return {name: digest for name, digest in found.items() if not any(p.startswith(".") for p in name.split("/"))}


class Hub(BaseHTTPRequestHandler):
    """Serves ARCHIVE as the hub does, with its size and sha256, slowly, and from any byte on."""

    def do_HEAD(self) -> None:
        self.send_headers(200, 0)

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        self.send_headers(206 if asked else 200, start)
        size = len(ARCHIVE) // 10
        for begin in range(start, len(ARCHIVE), size):
            self.wfile.write(ARCHIVE[begin : begin + size])
            time.sleep(SEND_S / 10)

    def send_headers(self, status: int, start: int) -> None:
        self.send_response(status if self.path.endswith(ARCHIVE_NAME) else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("X-Linked-Size", str(len(ARCHIVE)))
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(ARCHIVE).hexdigest()}"')
        self.send_header("Content-Length", str(len(ARCHIVE) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(ARCHIVE) - 1}/{len(ARCHIVE)}")
        self.end_headers()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (BrokenPipeError, ConnectionResetError):  # the client was killed
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    run_command(CommandPairsConfig, main)
