"""What all benchmarks share: the machine's name, running commands, reading texts and metrics, and writing the result.

Importing this module lets a benchmark import gpt_model and gptkit, which lie beside this folder and not in it. It does
not import torch: Linux reports for a command at least the memory of the process that started it (see `run`).
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
SAMPLE = ROOT / "dataset" / "sample"
SEPARATOR = "<|endoftext|>"  # prepare_aozora_jsonl.py's default
sys.path.insert(1, str(ROOT))  # behind the script's own folder, which leads already


def cpu_name() -> str:
    """Return a name such as "AMD EPYC, family 26, model 2": the first part alone may stand for several kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name") or platform.processor() or platform.machine()
    kind = [f"{key.split()[-1]} {fields[key]}" for key in ("cpu family", "model") if key in fields]
    return ", ".join([name, *kind])


def machine() -> dict[str, Any]:
    """Return the CPU's name, the number of cores and the version of Python."""
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "python": platform.python_version()}


def versions(*packages: str) -> dict[str, str | None]:
    """Return the installed version of each package, None where it is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def log(message: str) -> None:
    """Print a message on standard error; standard output is for the result."""
    print(message, file=sys.stderr, flush=True)


def script(name: str, **flags: object) -> list[str]:
    """Return the command line of one of the project's scripts; True stands for a flag without a value."""
    command = [sys.executable, str(ROOT / name)]
    for key, value in flags.items():
        command += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return command


def torchrun(n_processes: int, command: list[str], *flags: str) -> list[str]:
    """Return the command line that runs a script in n processes of this machine.

    With flags for a rendezvous it is that of one of several agents.
    """
    flags = flags or ("--standalone",)
    agent = [sys.executable, "-m", "torch.distributed.run", "--local-addr=127.0.0.1", *flags]
    return [*agent, f"--nproc-per-node={n_processes}", *command[1:]]


def run_logged(command: list[str], log_path: Path, **variables: str) -> float:
    """Run a command, with more environment variables and its output in a file; return the seconds that it took.

    Exits with the end of its output where it fails.
    """
    with open(log_path, "w+b") as output:
        began = time.perf_counter()
        exit_code = subprocess.run(
            command, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT
        ).returncode
        elapsed_s = time.perf_counter() - began
        end_if_failed(exit_code, command, output)
    return elapsed_s


def start(command: list[str], errors: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a command whose standard error goes to a file, and whose standard output is dropped."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def end_if_failed(exit_code: int, command: list[str], errors: IO[bytes]) -> None:
    """Exit with the end of a command's standard error where the command failed."""
    if exit_code:
        errors.seek(0)
        sys.exit(
            f"error: exit code {exit_code} from {' '.join(command)}\n{errors.read()[-2000:].decode(errors='replace')}"
        )


def run(command: list[str]) -> tuple[float, float]:
    """Run a command and return (elapsed_s, peak_mib); Linux reports no peak below that of the process that started it."""
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = start(command, errors)
        _, status, usage = os.wait4(process.pid, 0)
        elapsed_s = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        end_if_failed(process.returncode, command, errors)
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return elapsed_s, usage.ru_maxrss * unit / 2**20


def revision_of(folder: Path) -> str | None:
    """Return the commit that a checkout is at, or None where git cannot tell."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def output_of(command: list[str], **variables: str) -> str:
    """Run a command, with more environment variables, and return its standard output.

    Raises RuntimeError with the end of its standard error where it fails.
    """
    process = subprocess.run(command, env=os.environ | variables, capture_output=True, encoding="utf-8")
    if process.returncode:
        raise RuntimeError(f"{Path(command[1]).name}: exit code {process.returncode}: {process.stderr[-1500:]}")
    return process.stdout


def read_documents(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a .jsonl or .jsonl.xz file of documents, each with its "text"."""
    opened = lzma.open(path, "rb") if path.suffix == ".xz" else open(path, "rb")
    with opened as lines:
        return [json.loads(line) for line in lines]


def read_texts(path: Path) -> list[str]:
    """Return the "text" of each line of a .jsonl or .jsonl.xz file."""
    return [document["text"] for document in read_documents(path)]


def write_jsonl(path: Path, documents: list[dict[str, Any]]) -> None:
    """Write documents as JSONL, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(document, ensure_ascii=False) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")


def read_metrics(output_dir: Path) -> list[dict[str, Any]]:
    """Return the reports that a run of pretraining.py has written so far."""
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def result_path(name: str) -> Path:
    """Return the path of NAME.json in benchmarks/results, or in $RESULTS_DIR."""
    return Path(os.environ.get("RESULTS_DIR") or ROOT / "benchmarks" / "results") / f"{name}.json"


def save_result(name: str, result: dict[str, Any]) -> str:
    """Write the result, with the machine, to its file, and return what was written."""
    content = json.dumps(result | {"machine": machine()}, ensure_ascii=False, indent=1) + "\n"
    path = result_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    log(f"written: {path}")
    return content


def write_result(name: str, result: dict[str, Any]) -> None:
    """Print the result, with the machine, and write it to its file."""
    print(save_result(name, result), end="")
