"""Take a fresh machine to generated Japanese: make the environment, prepare the sample corpus, train, write a text.

    ./quickstart.sh                         do all of it; a second run finds the environment and starts at once
    ./quickstart.sh --install_only FILE     only make the environment, from a requirements file (used by run_tests.sh)

On Windows it is quickstart.ps1. Both only look for a Python that can run this file, so that everything else is written
once, in the one language that all systems here have. This file runs before any package is installed, so it imports
none, and from gptkit.base only what needs none.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.files import write_atomically
from gptkit.base.locks import LOCK_FILE, file_lock
from gptkit.base.paths import existing_path
from gptkit.base.processes import run_child

OLDEST, NEWEST = (3, 10), (3, 14)  # the versions for which every package in constraints.txt has wheels
VENV = Path(".venv")
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
PROBE = "import ensurepip, sys, venv; print(*sys.version_info[:2], int(sys.maxsize > 2**32))"
TOKENIZER = "--tokenizer sentencepiece --tokenizer_path dataset/sample/tokenizer"
ROAD = (
    "dataset/prepare_aozora_jsonl.py --jsonl_path dataset/sample/sample.jsonl --output_dir dataset/sample_001",
    f"pretokenize.py --data_dir dataset/sample_001 --output_dir dataset/sample_001_pretok {TOKENIZER} --val_fraction 0.05",
    f"pretraining.py --data_dir dataset/sample_001 --use_pretokenized --output_dir quickstart_run {TOKENIZER}"
    " --model_size micro --n_epochs 6 --batch_size 4 --val_fraction 0.05 --eval_freq 60"
    " --print_sample_iter 210 --device cpu",
    "inference.py --exp_dir quickstart_run --prompt 雨の匂いが --max_new_tokens 200 --temperature 0.8 --top_k 40"
    " --device cpu",
)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Make the environment, prepare the sample corpus, train on it and generate text."""

    install_only: str | None = setting(None, "only make the environment, from this requirements file")


def main(config: QuickstartConfig) -> int:
    os.chdir(Path(__file__).resolve().parent)
    make_environment(config.install_only if config.install_only is not None else "requirements.txt")
    if config.install_only is not None:
        return 0
    for line in ROAD:
        print(f"\n$ python {line}", flush=True)
        code = run_child(
            arguments_of(line), env=os.environ | {"PATH": f"{BIN.resolve()}{os.pathsep}{os.environ['PATH']}"}
        )
        if code:
            return code
    print("\nThe loss curve: quickstart_run/loss_curve.png")
    return 0


def arguments_of(line: str) -> list[str | bytes]:
    """Return the command line that runs a script in the environment; in UTF-8 whatever the locale, as a shell would."""
    script = line.split(" ")
    return [str(PYTHON), *(script if os.name == "nt" else map(str.encode, script))]


def make_environment(requirements: str) -> None:
    """Install the packages of a requirements file into .venv, unless they are those installed last. Raises UserError."""
    require_usable_environment()
    files = ("requirements.txt", existing_path(requirements, "--install_only"), "constraints.txt")
    wanted = b"".join(Path(file).read_bytes() for file in files)
    stamp = VENV / f"installed_from_{re.sub(r'[/:]', '_', Path(requirements).as_posix())}"

    def is_made() -> bool:
        return stamp.is_file() and stamp.read_bytes() == wanted

    if is_made():
        return
    with file_lock(VENV / LOCK_FILE, f"makes the environment {VENV}") as lock:
        if is_made():
            return
        print(f"making the environment {VENV} (this takes some minutes, once)", flush=True)
        if not has_pip():
            run_step(
                [*find_python(), "-m", "venv", str(VENV)],
                lock,
                f"{VENV} could not be made; see above, and put the repository on a disk that has symbolic links",
            )
        install = "-m pip install --quiet --disable-pip-version-check -c constraints.txt -r"
        run_step(
            [str(PYTHON), *install.split(" "), requirements],
            lock,
            f"the packages of {requirements} could not be installed; see pip's messages above, then run this again",
        )
        write_atomically(stamp, wanted)


def run_step(command: list[str], lock: int | None, if_it_fails: str) -> None:
    """Run a program that holds the lock for as long as it lives, even where this process is killed.

    Raises UserError where it fails, and exits with its code where a signal ended it.
    """
    inherited = () if lock is None or os.name == "nt" else (lock,)
    code = run_child(command, with_its_own=True, pass_fds=inherited)
    if code >= 128:
        sys.exit(code)
    if code:
        raise UserError(if_it_fails)


def require_usable_environment() -> None:
    """Raise UserError where there is a .venv that nothing can be installed into, and that venv would not repair."""
    problem = None
    if os.path.lexists(VENV) and not VENV.is_dir():
        problem = "is not a folder"
    elif os.path.lexists(PYTHON):
        try:
            question = [str(PYTHON), "-c", "import sys; print(*sys.version_info[:2])"]
            version = tuple(map(int, subprocess.run(question, capture_output=True).stdout.split()))
        except OSError:  # the system's Python was replaced by another
            version = ()
        if not version:
            problem = "has lost its Python"
        elif not OLDEST <= version <= NEWEST:
            problem = f"was made by Python {'.'.join(map(str, version))}, for which packages are missing"
    if problem:
        raise UserError(f"{VENV} {problem}; remove it and run this again")


def has_pip() -> bool:
    """Return whether .venv is an environment that packages can be installed into; not one that was killed halfway."""
    try:
        return not subprocess.run([str(PYTHON), "-c", "import pip"], capture_output=True).returncode
    except OSError:
        return False


def find_python() -> list[str]:
    """Return the command of the newest Python that all packages have wheels for. Raises UserError where there is none."""
    by_version = [f"3.{minor}" for minor in range(NEWEST[1], OLDEST[1] - 1, -1)]
    candidates = [["py", f"-{version}"] if os.name == "nt" else [f"python{version}"] for version in by_version]
    found: dict[tuple[int, int], list[str]] = {}
    for candidate in (*candidates, [sys.executable], ["python3"], ["python"]):
        version = version_of(candidate)
        if version:
            found.setdefault(version, candidate)
    fitting = [version for version in found if OLDEST <= version <= NEWEST]
    if fitting:
        return found[max(fitting)]
    remedy = {
        "win32": "winget install Python.Python.3.13",
        "darwin": "brew install python@3.13",
    }.get(
        sys.platform,
        "on Debian or Ubuntu apt install python3 python3-venv; elsewhere uv venv --seed --python 3.13 .venv",
    )
    others = ", ".join(".".join(map(str, version)) for version in sorted(found))
    raise UserError(
        f"no Python {'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))} with venv was found"
        f"{f', only {others}, for which packages are missing' if others else ''}; install one ({remedy})"
    )


def version_of(python: list[str]) -> tuple[int, int] | None:
    """Return the version of a Python of 64 bits that has venv, or None."""
    try:
        printed = subprocess.run([*python, "-c", PROBE], capture_output=True, timeout=60).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (int(printed[0]), int(printed[1])) if len(printed) == 3 and printed[2] == b"1" else None


if __name__ == "__main__":
    run_command(QuickstartConfig, main)
