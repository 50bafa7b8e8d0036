"""training/saver.py: checkpoints that are written beside the training."""

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_MODEL, assert_user_error, call_command, newest
from safetensors import SafetensorError
from test_checkpoints import CPU, TOKENIZER, contents, fail, steps

from gptkit.base.cli import UserError
from gptkit.training import checkpoints
from gptkit.training.checkpoints import MODEL_FILE, STATE_FILE, SUMS_FILE, read_tensors, write_checksums
from gptkit.training.saver import BackgroundWriter
from pretraining import PretrainingConfig, model_sizes


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
        lambda: monkeypatch.setattr(
            checkpoints.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20, total=1 << 30)
        ),
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


@pytest.mark.parametrize(
    "damage", [{"elapsed_s": "3"}, {"best_val_loss": []}, {"step": -1}, {"loss_sum": "1.0"}, {"n_rollbacks": 5000}]
)
def test_a_state_with_an_impossible_value_is_refused(damage: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    """Its checksums hold: whoever wrote it did so on purpose, or with another program."""
    output = Path(shutil.copytree(trained / "model_checkpoints", tmp_path / "out", symlinks=True))
    folder = newest(output)
    state = json.loads((folder / STATE_FILE).read_bytes())
    (folder / STATE_FILE).write_text(json.dumps(state | damage))
    sums = [line.split("  ")[1] for line in (folder / SUMS_FILE).read_text().splitlines()]
    write_checksums(folder, [folder / name for name in sums])
    settings = {name: value for name, value in state["settings"].items() if name in ("data_dir", "tokenizer_path")}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    more = ("--tokenizer", "sentencepiece", "--use_pretokenized", "--device", "cpu", *TINY_MODEL, "--max_steps", 3)
    result = call_command("pretraining.py", *flags, *more, "--output_dir", output)
    assert_user_error(result, "is damaged", "remove it to resume from an older checkpoint")


def test_a_state_without_a_dimension_is_refused() -> None:
    config = PretrainingConfig(data_dir="", init_from="a folder that is gone")
    with pytest.raises(UserError, match=r"the newest checkpoint is damaged \(KeyError\('context_length'\)\)"):
        model_sizes(config, 100, {"identity": {"model": {"emb_dim": 8}}})
