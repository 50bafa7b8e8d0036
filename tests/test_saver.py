"""training/saver.py: checkpoints that are written beside the training."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from test_checkpoints import CPU, TOKENIZER, contents, fail, steps

from gptkit.training import checkpoints
from gptkit.training.checkpoints import MODEL_FILE, read_tensors
from gptkit.training.saver import BackgroundWriter


def test_a_background_save_has_the_weights_of_its_moment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writer = BackgroundWriter(tmp_path, 1)
    weights = {"w": torch.ones(1000)}
    drawn: list[int] = []
    for step in (1, 2, 3):
        writer.save({"step": step, "val_loss": None}, weights, {}, TOKENIZER, then=lambda step=step: drawn.append(step))
        weights["w"].add_(1)  # as training does meanwhile
    writer.wait()
    assert (steps(tmp_path), drawn, writer.failure) == ([3], [1, 2, 3], None)
    assert "warning" not in capsys.readouterr().out
    assert read_tensors(tmp_path / "step_00000003", MODEL_FILE, CPU)["w"].unique().tolist() == [3.0]


def test_a_background_save_that_fails_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = BackgroundWriter(tmp_path, 1)
    writer.save({"step": 1, "val_loss": None}, {"w": torch.ones(9)}, {}, TOKENIZER)
    writer.wait()
    before = contents(tmp_path)
    for failing in (
        lambda: monkeypatch.setattr(checkpoints, "save_file", fail(SafetensorError("No space left on device"))),
        lambda: monkeypatch.setattr(checkpoints, "save_file", fail(OSError(errno.EIO, "broken disk"))),
        lambda: monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20)),
    ):
        failing()
        writer.save({"step": 2, "val_loss": None}, {"w": torch.ones(9)}, {}, TOKENIZER)
        writer.wait()
        monkeypatch.undo()
        assert writer.failure
        assert "step 2" in writer.failure
        assert contents(tmp_path) == before
    assert capsys.readouterr().out.count("warning: the checkpoint of step 2 could not be saved") == 3
    writer.save({"step": 3, "val_loss": None}, {"w": torch.ones(9)}, {}, TOKENIZER)
    writer.wait()
    assert writer.failure is None
    assert steps(tmp_path) == [3]
