"""What the benchmarks share: the machine's name, running a command, reading texts, and the result file.

Importing it lets a benchmark import gpt_model and gptkit, which lie beside this folder and not in it.
"""

import importlib.metadata
import json
import lzma
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("RESULTS_DIR") or ROOT / "benchmarks" / "results")
SEPARATOR = "<|endoftext|>"  # prepare_aozora_jsonl.py's default
sys.path.insert(1, str(ROOT))  # behind this folder, which leads already


def cpu_name() -> str:
    """Such as "AMD EPYC, family 26, model 2": the name alone may stand for several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name") or platform.processor() or platform.machine()
    kind = [f"{key.split()[-1]} {found[key]}" for key in ("cpu family", "model") if key in found]
    return ", ".join([name, *kind])


def machine() -> dict[str, Any]:
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str | None]:
    """The installed version of each package, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def script(name: str, **flags: object) -> list[str]:
    """The command line of one of the project's scripts."""
    return [
        sys.executable,
        str(ROOT / name),
        *(part for key, value in flags.items() for part in (f"--{key}", str(value))),
    ]


def torchrun(n_processes: int, command: list[str], *flags: str) -> list[str]:
    """That command line of a script, by n processes of this machine; with flags for a rendezvous, by one of its agents."""
    flags = flags or ("--standalone",)
    agent = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *flags]
    return [*agent, f"--nproc-per-node={n_processes}", *command[1:]]


def start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def end_if_failed(exit_code: int, command: list[str], errors: IO[bytes]) -> None:
    if exit_code:
        errors.seek(0)
        sys.exit(
            f"error: exit code {exit_code} from {' '.join(command)}\n{errors.read()[-2000:].decode(errors='replace')}"
        )


def run(command: list[str]) -> tuple[float, float]:
    """(elapsed_s, peak_mib) of one process; Linux never reports a peak below that of the process that started it."""
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = start(command, errors)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        end_if_failed(process.returncode, command, errors)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return elapsed_s, usage.ru_maxrss * unit / 2**20


def read_texts(path: Path) -> list[str]:
    """The "text" of each line of a .jsonl or .jsonl.xz file."""
    opened = lzma.open(path, "rb") if path.suffix == ".xz" else open(path, "rb")
    with opened as lines:
        return [json.loads(line)["text"] for line in lines]


def write_result(name: str, result: dict[str, Any]) -> None:
    """Print the result, with the machine, and write it to NAME.json in benchmarks/results, or in $RESULTS_DIR."""
    content = json.dumps(result | {"machine": machine()}, ensure_ascii=False, indent=1) + "\n"
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(content, encoding="utf-8")
    print(content, end="")
    say(f"written: {path}")
