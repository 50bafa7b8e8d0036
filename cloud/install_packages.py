"""Install what a requirements file lists and this Python lacks, but never another torch than the one that is there.

    python cloud/install_packages.py requirements.txt            # install
    python cloud/install_packages.py --check requirements.txt    # only report by the exit code whether all is there

The torch of an image fits its driver; the newest one may not. Where the system manages this Python (PEP 668), the
packages go into the environment .venv beside the requirements file, which sees the system's torch. This needs only
the standard library, and packaging to compare versions, which transformers brings and pip has a copy of.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

EXIT_USER_ERROR, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 75, 130
TRUE = ("y", "yes", "t", "true", "on", "1")  # as pip reads its variables


def main(arguments: list[str]) -> int:
    path = Path(arguments[-1])
    unmet = unmet_requirements(path)
    if arguments[0] == "--check" or not unmet:
        return 1 if unmet else 0
    torch = version("torch")
    too_old = [requirement for requirement in unmet if requirement.startswith("torch>")]
    if torch and too_old:
        print(
            f"error: torch {torch} of {sys.executable} is too old for {too_old[0]}, and it is not replaced here, since"
            f" another may not fit the driver; choose an image with a newer one, or install it by yourself",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR
    python = python_to_install_into(path.parent / ".venv")
    held = [f"torch=={torch}"] if torch else []
    print(f"installing packages with {python}: {', '.join(unmet)}", flush=True)
    # In place of this process, so that a signal reaches pip.
    os.execv(python, [python, "-m", "pip", "install", "--quiet", "-r", str(path), *held])


def unmet_requirements(path: Path) -> list[str]:
    """Return the lines of a requirements file that the installed packages do not meet."""
    lines = [line.partition("#")[0].strip() for line in path.read_text("utf-8").splitlines()]
    lines = [line for line in lines if line]
    try:
        from packaging.requirements import Requirement
    except ImportError:
        try:
            from pip._vendor.packaging.requirements import Requirement  # type: ignore[import-untyped, assignment, unused-ignore]
        except ImportError:  # a new Python, without pip
            return [line for line in lines if version(re.split("[<>=!~ ;[]", line)[0]) is None]
    unmet = []
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate():
            continue
        found = version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            unmet.append(line)
    return unmet


def version(name: str) -> str | None:
    """Return the installed version of a package, such as 2.8.0+cu128; None where it is missing."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def python_to_install_into(environment: Path) -> str:
    """Return this Python, with pip, or where the system manages it that of the environment, which is made.

    Exits with one line where that fails.
    """
    has_pip = importlib.util.find_spec("pip") is not None
    if sys.prefix != sys.base_prefix:  # an environment; uv makes them without pip
        if not has_pip:
            make([sys.executable, "-m", "ensurepip"], "pip")
        return sys.executable
    is_managed = Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists()
    if has_pip and (not is_managed or os.environ.get("PIP_BREAK_SYSTEM_PACKAGES", "").lower() in TRUE):
        return sys.executable
    # An environment looks for the packages of its Python beside the program itself, not beside a link to it.
    python = os.path.realpath(sys.executable)
    is_there = os.path.lexists(environment)
    if is_there and not is_made_here(environment, python):
        print(f"error: {environment} is there and has no torch; remove it, and it is made anew", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    print(f"making the environment {environment}", flush=True)
    try:
        make([python, "-m", "venv", "--system-site-packages", str(environment)], f"the environment {environment}")
    except SystemExit:
        if not is_there:
            shutil.rmtree(environment, ignore_errors=True)
        raise
    return str(environment.absolute() / "bin" / "python")


def is_made_here(environment: Path, python: str) -> bool:
    """Return whether an environment is as this program makes it: of this Python, whose packages it sees."""
    try:
        lines = (environment / "pyvenv.cfg").read_text("utf-8").splitlines()
    except OSError:
        return False
    found = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
    wanted = {
        "home": os.path.dirname(python),
        "version": ".".join(map(str, sys.version_info[:3])),
        "include-system-site-packages": "true",
    }
    return wanted.items() <= found.items()


def make(command: list[str], what: str) -> None:
    """Run a command that makes something. Exits with one line where it fails, and at a signal, which ends the command."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # not under nohup
            signal.signal(number, lambda *_: sys.exit(EXIT_STOPPED))
    # In a group of its own, since venv starts a process, too.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        printed = process.communicate()[0]
    except (SystemExit, KeyboardInterrupt) as stop:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        sys.exit(getattr(stop, "code", EXIT_INTERRUPTED))
    if process.returncode:
        print(
            f"error: {command[0]} cannot make {what}; on Debian or Ubuntu, run apt install python3-venv"
            f" ({' '.join(printed.split())[:200]})",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_ERROR)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
