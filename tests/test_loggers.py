"""gptkit/training/loggers.py: what each logger's own reader finds, over two sessions of a run, and loggers that fail."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, assert_user_error, call_command, environment, newest, small_run

from gptkit.training import loggers
from gptkit.training.run_log import Logger, RunLog, read_jsonl

VALUES = {"train_loss": 4.5, "val_loss": 4.75, "lr": 0.5, "grad_norm": 0.25}
# A session of a run that reports every 10 steps, after the first step that is given.
SESSION = """
import sys
from pathlib import Path
from gptkit.training.loggers import import_logger, open_logger
from gptkit.training.run_log import RunLog
name, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
import_logger(name, folder)
logger = open_logger(name, folder, first, {"lr": first})
log = RunLog(folder, first, 100, 8, 0.0, logger)
for step in range(first + 10, last + 1, 10):
    log.report(step, 1, train_loss=step / 2, val_loss=step / 4, lr=0.5, grad_norm=0.25)
    log.sample(step, f"春{step}\\n<夏>")
log.close()
"""


def session(name: str, folder: Path, first_step: int, last_step: int) -> str:
    """Run a session whose logger finds no account, and return what it prints."""
    variables = {key: value for key, value in environment().items() if not key.startswith(("WANDB", "TRACKIO"))}
    variables |= {"PYTHONPATH": str(ROOT), "HOME": str(folder.parent), "NETRC": str(folder.parent / "none")}
    result = subprocess.run(
        [sys.executable, "-c", SESSION, name, str(folder), str(first_step), str(last_step)],
        cwd=ROOT, env=variables, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "warning: --logger" not in result.stderr
    return result.stdout


@pytest.fixture
def exp001(tmp_path: Path) -> Path:
    folder = tmp_path / "exp001" / "model_checkpoints"
    folder.mkdir(parents=True)
    return folder


def two_sessions(name: str, exp001: Path) -> None:
    """Report at 10 … 40, then, from a checkpoint of step 20, at 30 … 60: 30 and 40 a second time."""
    session(name, exp001, 0, 40)
    session(name, exp001, 20, 60)
    assert [line["step"] for line in read_jsonl(exp001 / "metrics.jsonl")] == [10, 20, 30, 40, 50, 60]


def shown_by_tensorboard(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """Return what TensorBoard shows of a folder, read as its plugins read it: (step, value or text) by name."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0, "text": 0}).Reload()
    found: dict[str, list[tuple[int, Any]]] = {}
    for name in events.Tags()["tensors"]:
        values = [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(name)]
        found[name.removesuffix("/text_summary")] = [(n, v.decode() if isinstance(v, bytes) else v) for n, v in values]
    return found


def test_tensorboard(tmp_path: Path, short_shards: Path) -> None:
    """A run stops and resumes, its length changed: a step that is done again is shown once, as it was last."""
    pytest.importorskip("tensorboard")
    output = tmp_path / "exp001"
    arguments = small_run(short_shards, output, "adamw")
    often = ("--eval_freq", 1, "--print_sample_iter", 2, "--save_ckpt_freq", 2, "--logger", "tensorboard")
    assert call_command("pretraining.py", *arguments, *often, "--max_steps", 3).returncode == 0
    (newest(output) / "model.safetensors").write_bytes(b"damaged")  # so that it resumes from step 2
    result = call_command("pretraining.py", *arguments, *often, "--max_steps", 5)
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout
    metrics = read_jsonl(output / "metrics.jsonl")
    assert [report["step"] for report in metrics] == [1, 2, 3, 4, 5]
    found = shown_by_tensorboard(output / "tensorboard")
    for name in ("train_loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "tokens"):
        assert [step for step, _ in found[name]] == [1, 2, 3, 4, 5]
        assert [value for _, value in found[name]] == pytest.approx([report[name] for report in metrics], rel=1e-6)
    samples = {line["step"]: line["text"].replace("\n", "  \n") for line in read_jsonl(output / "samples.jsonl")}
    assert dict(found["sample"]) == samples
    assert [step for step, _ in found["sample"]] == [2, 4, 5]


def test_tensorboard_after_a_divergence(exp001: Path) -> None:
    pytest.importorskip("tensorboard")
    log = RunLog(exp001, 0, 100, 8, 0.0, loggers.open_logger("tensorboard", exp001, 0, {}))
    for step in (10, 20, 30):
        log.report(step, 1, **VALUES)
        log.sample(step, "first")
    log.roll_back(10)
    log.report(20, 1, **VALUES | {"val_loss": 1.0})
    log.sample(20, "second")
    log.close()
    found = shown_by_tensorboard(exp001 / "tensorboard")
    assert found["val_loss"] == [(10, 4.75), (20, 1.0)]
    assert found["sample"] == [(10, "first"), (20, "second")]
    assert [line["text"] for line in read_jsonl(exp001 / "samples.jsonl")] == ["first", "second"]


def wandb_records(path: Path) -> list[Any]:
    """Return the records of a .wandb file: a log of LevelDB, in blocks of 32 KiB, of wandb's own messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, part = path.read_bytes(), [], b""
    assert data[:4] == b":W&B"
    place = 7
    while place + 7 <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, place)  # checksum, bytes, 1 whole 2 first 3 middle 4 last
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(part))
            part = b""
        if 32768 - place % 32768 < 7:  # no room for the next one in this block
            place += 32768 - place % 32768
    return records


def test_wandb_without_an_account(exp001: Path) -> None:
    pytest.importorskip("wandb")
    two_sessions("wandb", exp001)
    folders = sorted(exp001.glob("wandb/offline-run-*"))
    ids, reports, samples = set(), [], []
    for folder in folders:
        records = wandb_records(next(folder.glob("*.wandb")))
        ids |= {record.run.run_id for record in records if record.HasField("run")}
        names = {record.run.display_name for record in records if record.HasField("run")}
        assert names == {"exp001"}
        for record in records:
            if record.HasField("history"):
                row = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                (samples if any(key.startswith("sample") for key in row) else reports).append(row)
        pages = [path.read_text("utf-8") for path in folder.glob("files/media/html/*.html")]
        assert sum("春" in page and "&lt;夏&gt;" in page for page in pages) == len(pages) > 0
    assert len(folders) == 2
    assert len(ids) == 1
    assert [row["step"] for row in reports] == [10, 20, 30, 40, 50, 60]
    assert [row["train_loss"] for row in reports] == [5, 10, 15, 20, 25, 30]
    assert [row["tokens"] for row in reports] == [80, 160, 240, 320, 400, 480]
    assert [row["step"] for row in samples] == [10, 20, 30, 40, 50, 60]


def test_trackio(exp001: Path) -> None:
    pytest.importorskip("trackio")
    (exp001 / "sessions.jsonl").write_text(
        '{"step": 0, "time": "09:00"}\n{"step": 0, "time": "09:30"}\n{"step": 20, "time": "10:00"}\n'
    )
    two_sessions("trackio", exp001)
    code = (
        "import json\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "runs = SQLiteStorage.get_runs('gptkit')\n"
        "print(json.dumps([[run, SQLiteStorage.get_logs('gptkit', run)] for run in runs]))"
    )
    variables = environment() | {"TRACKIO_DIR": str(exp001 / "trackio")}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    ((name, rows),) = json.loads(result.stdout.splitlines()[-1])
    assert name == "exp001 09:30"
    assert [row["step"] for row in rows if "val_loss" in row] == [10, 20, 30, 40, 50, 60]
    assert [row["step"] for row in rows if "sample" in row] == [10, 20, 30, 40, 50, 60]


def uninstall(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an import of the package fail."""
    (tmp_path / f"{package}.py").write_text("raise ImportError('none here')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in [module for module in sys.modules if module.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_an_error_before_training(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninstall(name, tmp_path, monkeypatch)
    with pytest.raises(loggers.UserError, match=f"--logger {name} .*pip install {name}"):
        loggers.import_logger(name, tmp_path)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall("tensorboard", tmp_path, monkeypatch)
    output = ("--output_dir", tmp_path / "out")
    result = call_command("pretraining.py", "--data_dir", "none", "--logger", "tensorboard", *output)
    assert_user_error(result, "pip install tensorboard")
    assert not (tmp_path / "out").exists()


def test_a_logger_that_fails_is_one_warning(exp001: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def report(step: int, values: object) -> None:
        calls.append(step)
        if step == 20:
            raise OSError(28, "No space\nleft")

    log = RunLog(exp001, 0, 100, 8, 0.0, loggers.ignore_failures("wandb", Logger(report)))
    for step in (10, 20, 30):
        log.report(step, 1, **VALUES)
        log.sample(step, "text")
    log.roll_back(20)
    log.close()
    assert calls == [10, 20]
    assert capsys.readouterr().err.count("\n") == 1
    assert [line["step"] for line in read_jsonl(exp001 / "metrics.jsonl")] == [10, 20]


def test_a_logger_that_cannot_be_opened_is_one_warning(
    exp001: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> Logger:
        raise RuntimeError("no account")

    monkeypatch.setattr(loggers, "_wandb", refuse)
    loggers.open_logger("wandb", exp001, 0, {}).report(1, VALUES)
    error = capsys.readouterr().err
    assert "--logger wandb failed (no account)" in error
    assert error.count("\n") == 1


def test_no_logger_is_nothing(exp001: Path) -> None:
    loggers.import_logger("none", exp001)
    logger = loggers.open_logger("none", exp001, 0, {})
    logger.report(1, VALUES)
    logger.sample(1, "text")
    logger.roll_back(0)
    logger.close()
    assert os.listdir(exp001) == []
