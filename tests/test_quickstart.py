"""quickstart.py and the script that starts it: which Python they take, one environment at a time, signals, exit codes."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, environment, start_process

import quickstart
from gptkit.base.cli import UserError
from gptkit.base.processes import run_child

HERE = sys.version_info[:2]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository whose environment needs no package."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "gptkit" / "base", folder / "gptkit" / "base")
    for name in ("gptkit/__init__.py", "quickstart.sh", "quickstart.py"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("requirements.txt", "constraints.txt", "none.txt"):
        (folder / name).write_text("# no package\n")
    return folder


def make_python(folder: Path, name: str, version: str, also: str = "exit 1") -> Path:
    """Write a program that answers the question for its version, and otherwise runs `also`."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/sh\ncase "$2" in *ensurepip*) echo {version.replace(".", " ")} 1;; *) {also};; esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({"python3": "3.15", "python3.13": "3.13"}, "python3.13"),
        ({"python3": "3.15", "python3.10": "3.10", "python3.12": "3.12"}, "python3.12"),
        ({"python3": "3.9", "python": "3.11"}, "python"),
        ({"python3": "3.14", "python3.14": "3.14", "python3.13": "3.13"}, "python3.14"),
        ({"python3": "2.7", "python3.13": "3.15", "python3.11": "3.11"}, "python3.11"),
    ],
    ids=str,
)
def test_the_newest_python_that_has_wheels(
    there: dict[str, str], chosen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in there.items():
        make_python(tmp_path, name, version)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3"))
    assert quickstart.find_python()[0].endswith(chosen)


def test_no_python_that_has_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(make_python(tmp_path, "python3", "3.15")))
    with pytest.raises(UserError, match=r"no Python 3\.10 to 3\.14 with venv was found, only 3\.15,.*; install one"):
        quickstart.find_python()
    (tmp_path / "python3").unlink()
    with pytest.raises(UserError, match=r"no Python 3\.10 to 3\.14 with venv was found; install one"):
        quickstart.find_python()


@pytest.mark.slow
def test_a_python_without_wheels_comes_first(repository: Path, tmp_path: Path) -> None:
    """python3 is 3.15 by its answers, and another stands beside it; the environment is made by the other."""
    programs = tmp_path / "programs"
    make_python(programs, "python3", "3.15", also=f'exec {sys.executable} "$@"')
    (programs / f"python3.{HERE[1]}").symlink_to(Path(sys.executable).resolve())
    variables = environment() | {"PATH": f"{programs}:/usr/bin:/bin"}
    command = [repository / "quickstart.sh", "--install_only", "none.txt"]
    result = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"version = 3.{HERE[1]}" in (repository / ".venv" / "pyvenv.cfg").read_text()
    wrong = subprocess.run([*command, "x"], env=variables, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "error: unrecognized arguments: x (--help lists the flags)\n")
    missing = subprocess.run([*command[:2], "nothing.txt"], env=variables, capture_output=True, text=True)
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: --install_only nothing.txt: no such file")


def test_the_versions_are_the_same_everywhere() -> None:
    minors = range(quickstart.OLDEST[1], quickstart.NEWEST[1] + 1)
    listed = ", ".join(f'"3.{minor}"' for minor in minors)
    assert f"python: [{listed}]" in (ROOT / ".github" / "workflows" / "test.yml").read_text()
    for name in ("quickstart.sh", "README.md", "README.en.md"):
        text = (ROOT / name).read_text("utf-8")
        assert all(f"python3.{minor}" in text for minor in minors) or re.search(
            rf"3\.{minors[0]}(〜| to )3\.{minors[-1]}", text
        )


def test_no_python_at_all(repository: Path) -> None:
    for program in ("bash", "env", "dirname"):
        (repository / program).symlink_to(shutil.which(program) or "")
    result = subprocess.run(
        [repository / "quickstart.sh"], env={"PATH": str(repository)}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: no Python 3.10 or newer was found; install one")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_the_environment_is_made_once(repository: Path) -> None:
    """pip of the second used to find half an environment."""
    start = [repository / "quickstart.sh", "--install_only", "none.txt"]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment()}
    first = subprocess.Popen(start, **how)
    while not (repository / ".venv" / "pyvenv.cfg").exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.run(start, **how)
    assert first.wait() == 0
    assert second.returncode == 0, second.stdout
    assert second.stdout.startswith(f"waiting for process {first.pid} on ")
    assert "which makes the environment .venv" in second.stdout
    assert "making" not in second.stdout
    third = subprocess.run(start, **how)
    assert (third.returncode, third.stdout) == (0, "")


def test_a_step_that_fails_ends_it_with_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "make_environment", lambda requirements: None)
    monkeypatch.setattr(quickstart, "arguments_of", lambda line: [sys.executable, "-c", line])
    monkeypatch.setattr(quickstart, "ROAD", ("open('a','w')", "raise SystemExit(75)", "open('b','w')"))
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    assert quickstart.main(quickstart.QuickstartConfig()) == 75
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


CHILD = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.6)  # it saves something
    raise SystemExit(70 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
time.sleep(60)
"""
PARENT = (
    "import sys; from gptkit.base.processes import run_child; sys.exit(run_child([sys.executable, '-c', sys.argv[1]]))"
)


@pytest.mark.parametrize(("number", "to_all"), [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_child_ends_in_its_own_time(number: int, to_all: bool) -> None:
    """A SIGTERM comes to the parent, Ctrl-C to both; the child's exit code is the parent's."""
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "cwd": ROOT, "start_new_session": True, "text": True}
    process = start_process([sys.executable, "-c", PARENT, CHILD], **how)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    (os.killpg if to_all else os.kill)(process.pid, number)
    assert process.wait(timeout=30) == 70 + number


def test_a_child_that_a_signal_ends(capfd: pytest.CaptureFixture[str]) -> None:
    code = "import os; os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", PARENT, code], cwd=ROOT).returncode == 128 + 9


def make_environment_of(repository: Path, pip: str) -> None:
    """Make an environment whose Python answers its version, has pip, and runs a line of shell as pip."""
    answers = f'case "$*" in *version_info*) echo 3 {HERE[1]};; *"import pip") ;; *) {pip};; esac'
    (repository / ".venv" / "bin").mkdir(parents=True)
    program = repository / ".venv" / "bin" / "python"
    program.write_text(f"#!/bin/sh\n{answers}\n")
    program.chmod(0o755)


def start_quickstart(repository: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, str(repository / "quickstart.py"), "--install_only", "none.txt"]
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return start_process(arguments, cwd=repository, start_new_session=True, **how)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_pip_that_outlives_quickstart_keeps_others_out(repository: Path) -> None:
    """Two in one environment would leave a mixture."""
    make_environment_of(repository, "touch begun; sleep 3; touch ended")
    first = start_quickstart(repository)
    wait_for(repository / "begun")
    first.kill()
    second = start_quickstart(repository)
    assert second.stdout
    assert second.stdout.readline().startswith(f"waiting for process {first.pid} on ")
    wait_for(repository / "ended")
    assert second.stdout.readline().startswith("making the environment")
    assert second.wait(timeout=60) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_what_makes_the_environment(repository: Path, number: int, code: int) -> None:
    """All of it, also what it had started, as venv starts ensurepip; and nothing is blamed.

    It is no shell that starts it: a signal between dash's fork and the program that it starts is lost.
    """
    start = "child = subprocess.Popen(['sleep', '60']); pathlib.Path('begun').touch(); child.wait()"
    make_environment_of(repository, f'exec {sys.executable} -c "import pathlib, subprocess; {start}"')
    process = start_quickstart(repository)
    wait_for(repository / "begun")
    os.kill(process.pid, number)
    printed = process.communicate(timeout=30)[0]  # until nobody has its output open
    assert process.returncode == code
    assert "error" not in printed


@pytest.mark.parametrize("what", ["3.9", "lost", "file", "nowhere"])
def test_an_environment_that_cannot_be_used(repository: Path, what: str) -> None:
    program = repository / ".venv" / "bin" / "python"
    if what == "3.9":
        make_environment_of(repository, "exit 1")
        program.write_text("#!/bin/sh\necho 3 9\n")
    elif what == "lost":
        program.parent.mkdir(parents=True)
        program.symlink_to(repository / "gone")
    elif what == "file":
        (repository / ".venv").write_text("")
    else:
        (repository / ".venv").symlink_to(repository / "gone")
    process = start_quickstart(repository)
    problem = {"3.9": "was made by Python 3.9, for which packages are missing", "lost": "has lost its Python"}
    line = f"error: .venv {problem.get(what, 'is not a folder')}; remove it and run this again\n"
    assert process.communicate(timeout=30)[0] == line
    assert process.returncode == 2


def test_a_signal_that_comes_before_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    popen = subprocess.Popen

    def late(*args: Any, **how: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return popen(*args, **how)

    monkeypatch.setattr(subprocess, "Popen", late)
    assert run_child([sys.executable, "-c", "import time; time.sleep(60)"]) == 128 + signal.SIGTERM
