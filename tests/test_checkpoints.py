"""gptkit/checkpoints.py: whole or not there, the newest and the best, and nothing that runs code."""

import errno
import math
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from gptkit import checkpoints
from gptkit.checkpoints import (
    MODEL_FILE,
    STATE_FILE,
    TRAINING_FILE,
    best_checkpoint,
    choose_checkpoint,
    find_checkpoints,
    load_model,
    read_state,
    read_tensors,
    save_checkpoint,
)
from gptkit.command_line import UserError

CPU = torch.device("cpu")
TOKENIZER = {"spiece.model": b"\x00\x01\xff", "config.json": "{'名': 1}".encode()}


def save(output_dir: Path, step: int, val_loss: float = 5.0, size: int = 10) -> Path:
    model = {"weight": torch.full((size,), float(step))}
    state = {"step": step, "val_loss": val_loss, "identity": {"名": [1, None, True]}}
    return save_checkpoint(output_dir, state, model, {"exp_avg.weight": torch.zeros(size)}, TOKENIZER)


def contents(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps(output_dir: Path) -> list[int]:
    """The steps of the whole checkpoints; no other entry may stand beside them."""
    found = find_checkpoints(output_dir)
    assert sorted(found) == sorted(output_dir.iterdir())
    return [read_state(folder)["step"] for folder in found]


def test_gives_back_what_it_was_given(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3, 4),
        "bfloat16": torch.randn(5).bfloat16(),
        "step": torch.tensor(7),
        "random.cpu": torch.get_rng_state(),
        "nan": torch.tensor([math.nan, math.inf]),
    }
    state = {"step": 300, "val_loss": 4.25, "elapsed_s": 1.5, "identity": {"tokenizer": "吾輩"}}
    folder = save_checkpoint(tmp_path, state, {"w": torch.arange(6.0)}, tensors, TOKENIZER)
    assert folder == tmp_path / "step_00000300"
    assert find_checkpoints(tmp_path) == [folder]
    assert read_state(folder).items() >= state.items()
    found = read_tensors(folder, TRAINING_FILE, CPU)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].nan_to_num(), tensor.nan_to_num()), name
    assert found["nan"].isnan().tolist() == [True, False]
    assert torch.equal(read_tensors(folder, MODEL_FILE, CPU)["w"], torch.arange(6.0))
    assert {name: (folder / "tokenizer" / name).read_bytes() for name in TOKENIZER} == TOKENIZER


def test_holds_no_pickle(tmp_path: Path) -> None:
    files = contents(save(tmp_path, 1))
    assert sorted(files) == [MODEL_FILE, STATE_FILE, "tokenizer/config.json", "tokenizer/spiece.model", TRAINING_FILE]
    for name in (MODEL_FILE, TRAINING_FILE):  # safetensors: the length of a JSON header, and the header
        assert files[name][8:10] == b'{"', name


def test_a_folder_without_its_state_is_not_trusted(tmp_path: Path) -> None:
    save(tmp_path, 1, val_loss=1.0)
    (save(tmp_path, 2) / STATE_FILE).unlink()
    for other in ("step_00000003x", "step_3", "xstep_00000003", ".step_00000003.partial"):
        (tmp_path / other).mkdir()
        (tmp_path / other / STATE_FILE).write_text("{}")
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("place", ["nowhere", "a file"])
def test_no_folder_no_checkpoints(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    assert find_checkpoints(tmp_path / place) == []


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    for left in (".step_00000002.partial", ".step_00000007.partial", ".step_00000001.old.partial"):
        (tmp_path / left / "tokenizer").mkdir(parents=True)
        (tmp_path / left / "tokenizer" / "old").write_text("old")
        (tmp_path / left / MODEL_FILE).write_text("half")
    folder = save(tmp_path, 2)
    assert steps(tmp_path) == [2]
    assert "tokenizer/old" not in contents(folder)


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([3.0], [1]),
        ([3.0, 2.0], [2]),
        ([3.0, 4.0], [1, 2]),
        ([3.0, 1.0, 2.0, 2.5], [2, 4]),
        ([3.0, 1.0, 2.0, 0.5], [4]),
        ([3.0, 1.0, 1.0, 2.0], [3, 4]),  # of equals the newest
        ([3.0, math.nan], [1, 2]),
        ([3.0, math.nan, 4.0], [1, 3]),
        ([math.nan, math.nan, 4.0, math.inf], [3, 4]),
        ([math.nan, math.nan], [2]),
    ],
    ids=str,
)
def test_keeps_the_newest_and_the_best(losses: list[float], kept: list[int], tmp_path: Path) -> None:
    for step, loss in enumerate(losses, 1):
        save(tmp_path, step, loss)
    assert steps(tmp_path) == kept
    assert best_checkpoint(find_checkpoints(tmp_path)).name == f"step_{kept[0]:08d}"


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999, 1.0)
    save(tmp_path, 100_000_000, 2.0)
    assert steps(tmp_path) == [99_999_999, 100_000_000]


def test_the_same_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    save(tmp_path, 5, 2.0, size=10)
    folder = save(tmp_path, 5, 3.0, size=20)
    assert steps(tmp_path) == [5]
    assert read_state(folder)["val_loss"] == 3.0
    assert len(read_tensors(folder, MODEL_FILE, CPU)["weight"]) == 20


@pytest.mark.parametrize("file", [MODEL_FILE, TRAINING_FILE])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "a byte short", "longer", "garbage"])
def test_a_damaged_file_is_told_with_a_remedy(file: str, damage: str, tmp_path: Path) -> None:
    path = save(tmp_path, 1) / file
    whole = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": whole[:30],
        "a byte short": whole[:-1],
        "longer": whole + b"x",
        "garbage": b"x" * 99,
    }
    path.unlink() if damage == "gone" else path.write_bytes(damaged[damage])
    with pytest.raises(UserError) as caught:
        read_tensors(path.parent, file, CPU)
    assert str(caught.value).startswith(f"{path}: cannot be read (")
    assert f"remove {path.parent} to use an older checkpoint" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"null", b"\xff\xfe{", b"[" * 100_000, b"{}", b'{"format": "gptkit-checkpoint", "version": 99}'],
    ids=lambda content: repr(content[:20]),
)
def test_a_damaged_state_is_told_with_a_remedy(content: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / STATE_FILE).write_bytes(content)
    with pytest.raises(UserError, match=r"step_00000001/state\.json: .*remove .*step_00000001 to use an older"):
        read_state(folder)


def fail(error: BaseException) -> Any:
    def failing(*_: Any) -> None:
        raise error

    return failing


@pytest.mark.parametrize("where", ["save_file", "write_json", "_sync", "os.replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_failed_save_leaves_the_old_checkpoint_alone(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    monkeypatch.setattr(f"gptkit.checkpoints.{where}", fail(error))
    with pytest.raises(type(error)):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert steps(tmp_path) == [1]


def test_a_full_disk_is_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "save_file", fail(SafetensorError("No space left on device")))
    with pytest.raises(UserError, match=r"step_00000002 could not be written \(No space left on device\); make room"):
        save(tmp_path, 2)
    assert steps(tmp_path) == []


def test_a_limit_of_the_system_leaves_the_old_checkpoint_alone(tmp_path: Path) -> None:
    """A write that really fails: the system refuses files over 20,000 bytes, as it would on a full disk."""
    save(tmp_path, 1)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="step_00000002 could not be written"):
            save(tmp_path, 2, size=100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before
    save(tmp_path, 2, size=100_000)
    assert steps(tmp_path) == [2]


def test_the_checkpoint_that_an_experiment_folder_means(tmp_path: Path) -> None:
    run = tmp_path / "exp" / "model_checkpoints"
    best, newest = save(run, 1, 2.0), save(run, 2, 3.0)
    for folder in (run, run.parent):
        assert choose_checkpoint(str(folder), "newest") == newest
        assert choose_checkpoint(str(folder), "best") == best
        assert choose_checkpoint(str(best), "newest") == best  # by name
    save(tmp_path / "exp" / "other_run", 9)
    with pytest.raises(UserError, match=r"exp holds several runs; name one: .*exp/model_checkpoints, .*exp/other_run"):
        choose_checkpoint(str(run.parent), "newest")
    with pytest.raises(UserError, match="holds no checkpoint"):
        choose_checkpoint(str(tmp_path), "newest")  # two folders up


def test_a_model_from_its_dimensions_and_weights(tmp_path: Path) -> None:
    def build(dimensions: dict[str, Any]) -> nn.Linear:
        return nn.Linear(dimensions["inputs"], dimensions["outputs"])

    kept, dimensions = nn.Linear(3, 2), {"inputs": 3, "outputs": 2}
    state = {"step": 1, "val_loss": 5.0, "identity": {"model": dimensions}}
    folder = save_checkpoint(tmp_path, state, kept.state_dict(), {}, TOKENIZER)
    loaded = load_model(folder, build, CPU)
    assert torch.equal(loaded.weight, kept.weight)
    assert torch.equal(loaded.bias, kept.bias)
    with pytest.raises(
        UserError, match=r"step_00000001 is damaged or from another version \(.*\); use another checkpoint"
    ):
        load_model(folder, lambda dimensions: build(dimensions | {"inputs": 4}), CPU)
    with pytest.raises(UserError, match=r"damaged or from another version \('width'\)"):
        load_model(folder, lambda dimensions: build({"inputs": dimensions["width"]}), CPU)
