"""gptkit/training/sessions.py: sessions.jsonl through an end, a stop, an error, a kill, a resume and a full disk."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from gptkit import __version__
from gptkit.base.cli import setting
from gptkit.training import sessions
from gptkit.training.run_log import read_jsonl
from gptkit.training.sessions import describe_environment, git_revision, record_session


@dataclass(frozen=True)
class Settings:
    data_dir: str = setting()
    lr: float = setting(0.1)
    seed: int = setting(1)


def ends(folder: Path) -> list[tuple[int, str | None]]:
    """Return the step at which each session began, and how it ended."""
    return [(line["step"], line.get("end", {}).get("how")) for line in read_jsonl(folder / "sessions.jsonl")]


def test_each_session_and_how_it_ended(tmp_path: Path) -> None:
    with record_session(tmp_path, 0, Settings("日本", 0.2), {"torch": "2"}) as end:
        assert ends(tmp_path) == [(0, None)]  # a kill would leave this
        end |= {"step": 10, "how": "finished", "reason": None}
    (line,) = read_jsonl(tmp_path / "sessions.jsonl")
    assert line["settings"] == {"data_dir": "日本", "lr": 0.2}  # the seed is the default
    assert line["environment"] == {"torch": "2"}
    assert line["end"]["step"] == 10
    with pytest.raises(ValueError, match="trouble"), record_session(tmp_path, 10, Settings("a"), {}):
        raise ValueError("trouble\nmore of it")
    assert read_jsonl(tmp_path / "sessions.jsonl")[1]["end"]["reason"] == "ValueError: trouble"
    with pytest.raises(SystemExit), record_session(tmp_path, 10, Settings("a"), {}):
        raise SystemExit(75)
    with pytest.raises(SystemExit), record_session(tmp_path, 20, Settings("a"), {}) as end:
        end |= {"step": 30, "how": "stopped", "reason": "SIGTERM"}
        raise SystemExit(75)
    assert ends(tmp_path) == [(0, "finished"), (10, "failed"), (10, "stopped"), (20, "stopped")]
    assert read_jsonl(tmp_path / "sessions.jsonl")[-1]["end"]["reason"] == "SIGTERM"
    with record_session(tmp_path, 10, Settings("a"), {}) as end:  # from an older checkpoint: step 20 is still to come
        end |= {"step": 40, "how": "finished", "reason": None}
    assert ends(tmp_path) == [(0, "finished"), (10, "failed"), (10, "stopped"), (10, "finished")]
    assert [path.name for path in tmp_path.iterdir()] == ["sessions.jsonl"]


def test_a_full_disk_is_a_warning_and_the_end_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "write_atomically", full)
        session = record_session(tmp_path, 0, Settings("a"), {})
        end = session.__enter__()
    assert "No space left" in capsys.readouterr().err
    end |= {"step": 1, "how": "finished", "reason": None}
    session.__exit__(None, None, None)
    assert ends(tmp_path) == [(0, "finished")]


def test_the_environment_does_not_identify_the_machine(tmp_path: Path) -> None:
    found = describe_environment(torch.device("cpu"), torch.float32)
    assert found["version"] == __version__
    assert found["torch"] == torch.__version__
    assert found["dtype"] == "float32"
    assert str(ROOT) not in json.dumps(found)


def test_the_revision(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, encoding="utf-8"
        ).stdout.strip()

    assert git_revision(tmp_path) is None
    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    assert git_revision(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "--short=12", "HEAD") + "-dirty"
