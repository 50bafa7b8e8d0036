"""gptkit/training/checkpoints.py: a checkpoint is complete or absent, the newest and the best stay, none runs code."""

import errno
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_LINKS, file_size_limit, needs_links
from safetensors import SafetensorError
from torch import nn

from gptkit.base.cli import UserError
from gptkit.base.files import sha256_of
from gptkit.training import checkpoints
from gptkit.training.checkpoints import (
    MODEL_FILE,
    STATE_FILE,
    SUMS_FILE,
    TRAINING_FILE,
    DamagedCheckpoint,
    find_checkpoints,
    first_valid,
    newest_valid,
    read_state,
    read_tensors,
    save_checkpoint,
    set_aside_newer,
    sort_by_val_loss,
    verify_checkpoint,
)
from gptkit.training.loading import choose_checkpoint, load_model

CPU = torch.device("cpu")
TOKENIZER = {"spiece.model": b"\x00\x01\xff", "config.json": "{'名': 1}".encode()}


def save(output_dir: Path, step: int, val_loss: float | None = 5.0, size: int = 10, keep: int = 1) -> Path:
    model = {"weight": torch.full((size,), float(step))}
    state = {"step": step, "val_loss": val_loss, "identity": {"名": [1, None, True]}}
    return save_checkpoint(output_dir, state, model, {"exp_avg.weight": torch.zeros(size)}, TOKENIZER, keep)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, hidden files too, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def steps(output_dir: Path) -> list[int]:
    """Return the steps of the checkpoints; assert that all are complete and that beside them there are only the links."""
    found = find_checkpoints(output_dir)
    assert sorted(found) == sorted(path for path in output_dir.iterdir() if not path.is_symlink())
    for folder in found:
        verify_checkpoint(folder)
    if found and HAS_LINKS:
        assert (output_dir / "latest").resolve() == found[-1].resolve()
        assert (output_dir / "best").resolve() == sort_by_val_loss(found)[0].resolve()
    return [read_state(folder)["step"] for folder in found]


def test_reads_what_was_saved(tmp_path: Path) -> None:
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
    tokenizer = ["tokenizer/config.json", "tokenizer/spiece.model"]
    assert sorted(files) == [SUMS_FILE, MODEL_FILE, STATE_FILE, *tokenizer, TRAINING_FILE]
    for name in (MODEL_FILE, TRAINING_FILE):  # safetensors: the length of a JSON header, and the header
        assert files[name][8:10] == b'{"', name


def test_only_folders_of_that_name_are_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, 1, val_loss=1.0)
    for other in ("step_00000003x", "step_3", "xstep_00000003", ".step_00000003.partial"):
        (tmp_path / other).mkdir()
        (tmp_path / other / STATE_FILE).write_text("{}")
    assert [folder.name for folder in find_checkpoints(tmp_path)] == ["step_00000001"]


@pytest.mark.parametrize("place", ["nowhere", "a file"])
def test_no_folder_no_checkpoints(place: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("")
    assert find_checkpoints(tmp_path / place) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
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
    assert sort_by_val_loss(find_checkpoints(tmp_path))[0].name == f"step_{kept[0]:08d}"


def test_a_folder_that_cannot_be_removed_is_removed_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens on a mounted bucket, where a folder that was just renamed has another inode."""
    save(tmp_path, 1)
    with monkeypatch.context() as bucket:
        bucket.setattr("os.path.samestat", lambda *_: False)
        verify_checkpoint(save(tmp_path, 2, val_loss=4.0))
    assert [path.name for path in find_checkpoints(tmp_path)] == ["step_00000002"]
    save(tmp_path, 3, val_loss=3.0)
    assert steps(tmp_path) == [3]


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


def mutations(content: bytes, how_many: int, draw: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """Yield ways to damage a file: gone, empty, cut, longer, one bit flipped."""
    yield from (("gone", None), ("empty", b""), ("longer", content + b"x"), ("a byte short", content[:-1]))
    for _ in range(how_many):
        place = draw.randrange(len(content))
        yield f"cut at {place}", content[:place]
        flipped = bytearray(content)
        flipped[place] ^= 1 << draw.randrange(8)
        yield f"a bit of byte {place} flipped", bytes(flipped)


def test_no_damage_of_the_newest_goes_unnoticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After each of some 260 mutations the checkpoint before is used, with a warning."""
    older, newest = save(tmp_path, 1, keep=2), save(tmp_path, 2, keep=2)
    draw, n_tried = random.Random(0), 0
    for name, content in contents(newest).items():
        for what, damaged in mutations(content, 20, draw):
            path = newest / name
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert newest_valid(tmp_path) == older, (name, what)
            assert f"warning: {newest} is damaged (" in capsys.readouterr().err, (name, what)
            path.write_bytes(content)
            n_tried += 1
    assert n_tried >= 200
    assert newest_valid(tmp_path) == newest
    assert capsys.readouterr().err == ""


def test_where_all_are_damaged_the_error_names_a_remedy(tmp_path: Path) -> None:
    assert newest_valid(tmp_path) is None
    folder = save(tmp_path, 1)
    (folder / MODEL_FILE).write_bytes(b"x")
    with pytest.raises(
        UserError, match=r"no checkpoint is intact \(.*step_00000001: model.safetensors is not what was sav"
    ):
        newest_valid(tmp_path)
    with pytest.raises(UserError, match="no checkpoint is intact"):
        choose_checkpoint(str(tmp_path), "newest")


def test_generation_does_not_need_the_optimizers_state(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / TRAINING_FILE).write_bytes(b"x")
    assert choose_checkpoint(str(tmp_path), "newest") == folder
    with pytest.raises(DamagedCheckpoint, match=r"training\.safetensors is not what was saved"):
        verify_checkpoint(folder)
    (folder / TRAINING_FILE).unlink()
    assert choose_checkpoint(str(folder), "newest") == folder
    with pytest.raises(DamagedCheckpoint, match=r"training\.safetensors is missing"):
        verify_checkpoint(folder)
    sums = (folder / SUMS_FILE).read_text()
    (folder / SUMS_FILE).write_text("".join(line for line in sums.splitlines(True) if TRAINING_FILE not in line))
    assert choose_checkpoint(str(tmp_path), "newest") == folder
    with pytest.raises(DamagedCheckpoint, match="does not name what a checkpoint holds"):
        verify_checkpoint(folder)
    for name in (MODEL_FILE, STATE_FILE, "tokenizer/spiece.model"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(UserError, match=f"{name} is not what was saved"):
            choose_checkpoint(str(tmp_path), "newest")
        (folder / name).write_bytes(content)


@needs_links
def test_a_copied_link_is_not_taken_for_the_newest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tool that follows links has made folders of `latest` and `best`, and the run went on."""
    copied = tmp_path / "copied"
    save(tmp_path / "run", 1, 5.0)
    shutil.copytree(tmp_path / "run", copied)
    for name in ("latest", "best"):
        assert not (copied / name).is_symlink()
        assert choose_checkpoint(str(copied / name), "newest") == copied / name
    assert capsys.readouterr().err == ""
    save(copied, 2, 4.0, keep=9)
    save(copied, 3, 6.0, keep=9)
    for name, step, better in (("latest", 3, "newer"), ("best", 2, "better")):
        assert choose_checkpoint(str(copied / name), "newest") == copied / f"step_{step:08d}"
        warning = (
            f"warning: {copied / name} is a copy of step 1 and no link; a {better} one lies beside it and is used,"
            f" {copied}/step_0000000{step}\n"
        )
        assert capsys.readouterr().err == warning
        assert choose_checkpoint(str(tmp_path / "run" / name), "newest") == tmp_path / "run" / name  # a link
    (copied / "step_00000003" / MODEL_FILE).write_bytes(b"")
    assert choose_checkpoint(str(copied / "latest"), "newest") == copied / "step_00000002"
    assert "step_00000003 is damaged" in capsys.readouterr().err
    shutil.copytree(copied / "latest", tmp_path / "alone" / "latest")  # all that somebody fetched
    assert choose_checkpoint(str(tmp_path / "alone"), "newest") == tmp_path / "alone" / "latest"
    shutil.copytree(copied / "latest", tmp_path / "run" / "mine")
    assert choose_checkpoint(str(tmp_path / "run" / "mine"), "newest") == tmp_path / "run" / "mine"


@needs_links
def test_no_path_leads_out_of_a_checkpoint(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    folder = save(tmp_path / "run", 1)
    sums = (folder / SUMS_FILE).read_text()
    for name in ("../../secret", "/etc/hostname", "tokenizer/../../../secret", "tokenizer/..", str(secret)):
        (folder / SUMS_FILE).write_text(f"{sums}{sha256_of(secret)}  {name}\n")
        with pytest.raises(DamagedCheckpoint, match="does not name what a checkpoint holds"):
            verify_checkpoint(folder)
    (folder / SUMS_FILE).write_text(sums)
    (folder / MODEL_FILE).rename(tmp_path / "elsewhere")
    (folder / MODEL_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors is missing"):
        verify_checkpoint(folder)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"null", b"\xff\xfe{", b"[" * 100_000, b"{}", b'{"format": "gptkit-checkpoint", "version": 99}'],
    ids=lambda content: repr(content[:20]),
)
def test_the_error_of_an_invalid_state_names_a_remedy(content: bytes, tmp_path: Path) -> None:
    """The state is as a stranger could write it, with a checksum that fits."""
    folder = save(tmp_path, 1)
    before = sha256_of(folder / STATE_FILE)
    (folder / STATE_FILE).write_bytes(content)
    sums = (folder / SUMS_FILE).read_text()
    (folder / SUMS_FILE).write_text(sums.replace(before, sha256_of(folder / STATE_FILE)))
    with pytest.raises(UserError, match=r"step_00000001/state\.json: .*remove .*step_00000001 to use an older"):
        read_state(folder)
    with pytest.raises(UserError, match=r"no checkpoint is intact .*state\.json"):
        first_valid([folder])


def test_damaged_checkpoints_are_set_aside(tmp_path: Path) -> None:
    older, newest = save(tmp_path, 1, keep=2), save(tmp_path, 2, keep=2)
    (newest / MODEL_FILE).unlink()
    set_aside_newer(older)
    assert find_checkpoints(tmp_path) == [older]
    assert (tmp_path / "step_00000002.damaged" / STATE_FILE).is_file()


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="step_00000002 is not written: b holds values that are not finite"):
        save_checkpoint(tmp_path, {"step": 2}, {"a": torch.ones(2), "b": torch.tensor([1.0, math.nan])}, {}, TOKENIZER)
    assert contents(tmp_path) == before


def test_names_are_those_of_the_bare_model(tmp_path: Path) -> None:
    """torch.compile and DistributedDataParallel put prefixes before each name."""
    state = {"step": 1, "val_loss": None, "identity": {"model": {"vocab_size": 7}}}
    bare = nn.Linear(2, 2)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in bare.state_dict().items()}
    folder = save_checkpoint(tmp_path, state, wrapped, {}, TOKENIZER)
    assert torch.equal(load_model(folder, lambda _: nn.Linear(2, 2), 7, CPU).weight, bare.weight)


def test_a_pickle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "model.pt").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    for path in (tmp_path / "exp", tmp_path / "exp" / "model.pt"):
        with pytest.raises(UserError, match=r"exp/model.pt is a pickle, which can run any code"):
            choose_checkpoint(str(path), "newest")


def test_dimensions_that_do_not_match_the_weights_allocate_nothing(tmp_path: Path) -> None:
    def build(dimensions: dict[str, Any]) -> nn.Linear:
        return nn.Linear(dimensions["inputs"], 2, bias=False)

    state = {"step": 1, "val_loss": None, "identity": {"model": {"vocab_size": 7, "inputs": 10**12}}}
    folder = save_checkpoint(tmp_path, state, {"weight": torch.ones(2, 3)}, {}, TOKENIZER)
    with pytest.raises(UserError, match=r"weight is \[2, 3\], not \[2, 1000000000000\]"):
        load_model(folder, build, 7, CPU)


def fail(error: BaseException) -> Any:
    def failing(*_: Any) -> None:
        raise error

    return failing


@pytest.mark.parametrize("where", ["save_file", "write_json", "sync_file", "write_atomically", "move_folder"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_failed_save_leaves_the_old_checkpoint_alone(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    before = contents(tmp_path)
    monkeypatch.setattr(f"gptkit.training.checkpoints.{where}", fail(error))
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
    """The write really fails: the system refuses files over 20,000 bytes, as it would on a full disk."""
    save(tmp_path, 1)
    before = contents(tmp_path)
    with file_size_limit(20_000), pytest.raises(UserError, match="step_00000002 could not be written"):
        save(tmp_path, 2, size=100_000)
    assert contents(tmp_path) == before
    save(tmp_path, 2, size=100_000)
    assert steps(tmp_path) == [2]


def test_which_checkpoint_a_folder_stands_for(tmp_path: Path) -> None:
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

    saved, dimensions = nn.Linear(3, 2), {"vocab_size": 7, "inputs": 3, "outputs": 2}
    state = {"step": 1, "val_loss": 5.0, "identity": {"model": dimensions}}
    folder = save_checkpoint(tmp_path, state, saved.state_dict(), {}, TOKENIZER)
    loaded = load_model(folder, build, 7, CPU)
    assert torch.equal(loaded.weight, saved.weight)
    assert torch.equal(loaded.bias, saved.bias)
    with pytest.raises(
        UserError, match=r"step_00000001 is damaged or from another version \(.*\); use another checkpoint"
    ):
        load_model(folder, lambda dimensions: build(dimensions | {"inputs": 4}), 7, CPU)
    with pytest.raises(UserError, match=r"damaged or from another version \('width'\)"):
        load_model(folder, lambda dimensions: build({"inputs": dimensions["width"]}), 7, CPU)
    with pytest.raises(UserError, match=r"its tokenizer has 9 ids, and the model 7"):
        load_model(folder, build, 9, CPU)
