"""gptkit/base/cli.py: flags from a dataclass, and how a command ends."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import LINUX_ONLY, ROOT, assert_user_error, call_command, environment, reset_signals

from gptkit.base.cli import UserError, parse, setting
from gptkit.base.paths import existing_path, hub_folder, likely_path


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A toy."""

    name: str = setting(help="who, in 100 % of the cases")
    steps: int = setting(10, "how many", at_least=1)
    lr: float = setting(1e-3, "how fast", more_than=0, at_most=1)
    minutes: float | None = setting(None, "how long", at_least=0)
    share: float = setting(0.5, "how much", less_than=1)
    seed: int | None = setting(None, "which")
    mode: Literal["fast", "slow"] = setting("fast", "how")
    cached: bool = setting(False, "whether")
    biased: bool = setting(True, "whether, too")


def toy(*flags: str) -> Toy:
    return parse(Toy, ["--name", "吾輩", *flags])


def test_defaults() -> None:
    assert toy() == Toy(
        name="吾輩", steps=10, lr=1e-3, minutes=None, share=0.5, seed=None, mode="fast", cached=False, biased=True
    )


@pytest.mark.parametrize(
    ("flags", "field", "value"),
    [
        ("--steps 1", "steps", 1),
        ("--steps=25", "steps", 25),
        ("--lr 1", "lr", 1.0),
        ("--lr 5e-4", "lr", 5e-4),
        ("--minutes 0", "minutes", 0.0),
        ("--minutes 1.5", "minutes", 1.5),
        ("--seed -3", "seed", -3),
        ("--mode slow", "mode", "slow"),
        ("--cached", "cached", True),
        ("--no-cached", "cached", False),
        ("--no-biased", "biased", False),
        ("--steps 2 --steps 3", "steps", 3),
        (f"--seed 1{'0' * 400}", "seed", 10**400),
    ],
    ids=lambda value: str(value)[:30],
)
def test_flags(flags: str, field: str, value: Any) -> None:
    found = getattr(toy(*flags.split()), field)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "--steps 0 is too small; it must be at least 1"),
        ("--steps -5", "--steps -5 is too small; it must be at least 1"),
        ("--steps 1.5", "argument --steps: invalid int value: '1.5' (--help lists the flags)"),
        ("--steps many", "argument --steps: invalid int value: 'many'"),
        ("--steps", "argument --steps: expected one argument"),
        ("--lr 0", "--lr 0.0 is too small; it must be more than 0"),
        ("--lr 1.01", "--lr 1.01 is too large; it must be at most 1"),
        ("--share 1", "--share 1.0 is too large; it must be less than 1"),
        ("--lr nan", "--lr nan is not a finite number"),
        ("--minutes inf", "--minutes inf is not a finite number"),
        ("--minutes -inf", "--minutes: expected one argument"),
        ("--minutes=-inf", "--minutes -inf is not a finite number"),
        ("--minutes 1e999", "--minutes inf is not a finite number"),
        ("--minutes=-0.1", "--minutes -0.1 is too small; it must be at least 0"),
        ("--mode quick", "--mode: invalid choice: 'quick' (choose from"),
        ("--cached yes", "unrecognized arguments: yes (--help lists the flags)"),
        ("--step 3", "unrecognized arguments: --step 3 (--help lists the flags)"),  # no abbreviations
        ("--bogus", "unrecognized arguments: --bogus (--help lists the flags)"),
    ],
)
def test_wrong_flags(flags: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        toy(*flags.split())
    assert message in str(caught.value)


def test_a_flag_without_a_default_must_be_given() -> None:
    with pytest.raises(UserError, match=r"required: --name \(--help lists the flags\)"):
        parse(Toy, [])


def test_help_shows_fields_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(Toy, ["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "A toy." in text
    assert "--name STR who, in 100 % of the cases" in text
    assert "--steps INT how many (default: 10)" in text
    assert "--mode {fast,slow} how (default: fast)" in text
    assert "--cached, --no-cached" in text
    assert "None" not in text


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a project with dataset/001 and exp001, and go to its root."""
    (tmp_path / "dataset" / "001").mkdir(parents=True)
    (tmp_path / "dataset" / "sample.jsonl").write_text("")
    (tmp_path / "exp001").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("folder", "given", "meant"),
    [
        (".", "../dataset/001", "dataset/001"),  # the experiment's line, run from the root
        (".", "../../dataset/001/", "dataset/001"),
        ("exp001", "dataset/001", "../dataset/001"),  # and the other way round
        ("exp001", "./dataset/001", "../dataset/001"),
        ("exp001", "../../dataset/001", "../dataset/001"),
        ("dataset/001", "exp001", "../../exp001"),
        (".", "dataset/0001", "dataset/001"),
        (".", "dataset/sample.json", "dataset/sample.jsonl"),
        ("exp001", "../dataset/sample.json", "../dataset/sample.jsonl"),
        ("exp001", "dataset/sample.json", "../dataset/sample.jsonl"),
        (".", "exp01", "exp001"),
        (".", "{tree}/dataset/0001", "{tree}/dataset/001"),
    ],
)
def test_a_missing_path_names_the_one_probably_meant(
    folder: str, given: str, meant: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree / folder)
    given, meant = given.format(tree=tree), meant.format(tree=tree)
    with pytest.raises(UserError) as caught:
        existing_path(given, "--data_dir")
    assert str(caught.value) == f"--data_dir {given}: no such file or folder; did you mean {meant}?"
    assert existing_path(meant, "--data_dir") == Path(meant)


@pytest.mark.parametrize("given", ["elsewhere/x", "dataset/zzz", "../zzz", "/no/such/path", "dataset/sample.jsonl/x"])
def test_a_missing_path_unlike_any_other(given: str, tree: Path) -> None:
    assert likely_path(Path(given)) is None
    with pytest.raises(UserError) as caught:
        existing_path(given, "--data_dir")
    assert str(caught.value) == f"--data_dir {given}: no such file or folder (looked from {tree})"


def test_an_empty_path_is_not_the_working_directory(tree: Path) -> None:
    """As a variable of the shell that is not set gives it."""
    with pytest.raises(UserError, match="--exp_dir is empty; name a file or folder"):
        existing_path("", "--exp_dir")
    with pytest.raises(UserError, match="--hf_name is empty; name a folder, or a repository"):
        hub_folder("", "--hf_name", [])


SCRIPT = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from gptkit.base.cli import UserError, skip_destructors, run_command, setting

@dataclass
class Config:
    \"\"\"A toy.\"\"\"
    body: str = setting(help="the body of main")

def main(config):
    names = {{}}
    exec("def body():\\n    " + config.body, globals(), names)
    return names["body"]()

run_command(Config, main)
"""


def run(folder: Path, body: str, prints_its_work: bool = False, **how: Any) -> subprocess.CompletedProcess:
    """Run a real command whose main is `body`; it heeds signals, whatever shell runs the tests."""
    script = folder / "toy.py"
    script.write_text(SCRIPT.replace("(Config, main)", f"(Config, main, {prints_its_work=})"), "utf-8")
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": reset_signals} | how
    env = environment()
    env.pop("PYTHONUNBUFFERED", None)  # a buffer is what makes the end of a command hard
    return subprocess.run([sys.executable, str(script), "--body", body], encoding="utf-8", env=env, timeout=60, **how)


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("return None", 0), ("return 3", 3), ("sys.exit(4)", 4)])
def test_exit_code_of_main(body: str, code: int, tmp_path: Path) -> None:
    result = run(tmp_path, f"print('done'); {body}")
    assert (result.returncode, result.stdout, result.stderr) == (code, "done\n", "")


@pytest.mark.parametrize(
    ("body", "code", "stderr"),
    [
        ("return 3", 3, ""),
        ("raise UserError('--x 3 is wrong')", 2, "error: --x 3 is wrong\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_a_command_may_end_without_the_destructors_of_its_libraries(
    body: str, code: int, stderr: str, tmp_path: Path
) -> None:
    """Its output and its exit code are the same; what would run at exit, here an abort, does not."""
    result = run(
        tmp_path, f"import atexit; atexit.register(os.abort); skip_destructors(); print('done', end=''); {body}"
    )
    assert (result.returncode, result.stdout, result.stderr) == (code, "done", stderr)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ("raise UserError('--x 3 is wrong;\\n  give 4')", "--x 3 is wrong; give 4"),
        (
            "raise OSError(28, 'x', 'some/file')",
            "some/file: no space left on device; make room on the disk and run the same command again",
        ),
        (
            "raise OSError(122, 'x')",
            "writing: disk quota exceeded; make room in the quota and run the same command again",
        ),
        ("raise OSError(13, 'x', '/a')", "/a: permission denied; check who owns it and its permissions"),
        ("raise OSError(30, 'x', '/a')", "/a: read-only file system; choose a folder that can be written to"),
        ("open('toy.py/x')", "toy.py/x: not a directory; a part of this path is a file; choose another"),
        ("os.mkdir(300 * 'x')", f"{300 * 'x'}: file name too long; choose a shorter name"),
        (
            "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); open('x', 'wb', 0).write(bytes(9)); "
            "open('x', 'ab', 0).write(b'x')",
            "writing: file too large; raise the limit on file sizes (ulimit -f) and run the same command again",
        ),
    ],
    ids=lambda value: value[:40],
)
def test_mistakes_are_one_line(body: str, line: str, tmp_path: Path) -> None:
    result = run(tmp_path, f"print('so far'); {body}", cwd=tmp_path)
    assert_user_error(result)
    assert (result.stdout, result.stderr) == ("so far\n", f"error: {line}\n")


@pytest.mark.parametrize("body", ["raise FileNotFoundError(2, 'x', 'file')", "1 / 0"])
def test_an_unexpected_error_keeps_its_traceback(body: str, tmp_path: Path) -> None:
    result = run(tmp_path, body)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")


PRINTS = pytest.mark.parametrize("body", ["print('x')", "print('x' * 100_000)", "print('x', flush=True)"])


@LINUX_ONLY
@PRINTS
def test_standard_output_on_a_full_disk(body: str, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = run(tmp_path, body, prints_its_work=True, stdout=full)
    assert_user_error(result, "writing: no space left on device; make room")
    assert len(result.stderr.splitlines()) == 1


@PRINTS
@pytest.mark.parametrize("prints_its_work", [True, False])
def test_a_reader_that_left_is_no_mistake(body: str, prints_its_work: bool, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = run(tmp_path, body, prints_its_work, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("prints_its_work", [True, False])
def test_without_a_standard_output(prints_its_work: bool, tmp_path: Path) -> None:
    result = run(tmp_path, "print('x')", prints_its_work, stdout=None, preexec_fn=lambda: os.close(1))
    assert (result.returncode, result.stderr) == (0, "")


def test_ctrl_c_prints_one_word(tmp_path: Path) -> None:
    result = run(tmp_path, "import signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(30)")
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.parametrize("device", ["cpu:x", "cuda:99"])
def test_a_missing_device(device: str, tmp_path: Path) -> None:
    result = call_command("inference.py", "--exp_dir", tmp_path, "--prompt", "吾輩は", "--device", device)
    assert_user_error(result, f"--device {device} is not ")
