"""What a run does about trouble: values that are not finite, too little memory, a full disk, data that changes,
settings that change, a checkpoint that was damaged.

Where trouble must strike at one step, it strikes just before the gradient is clipped. Where it takes a process (one that
is replaced, one that sees a disk of its own), a driver script strikes inside the process that runs the command.
"""

import contextlib
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_user_error, call_command, command, curve, environment, newest, small_run

from gpt_model import GPTModel

# Runs pretraining.py with the arguments after the first, whose code may reach into it before it begins.
DRIVER = """
import sys
sys.path.insert(0, {root!r})
code, sys.argv = sys.argv[1], ["pretraining.py", *sys.argv[2:]]
import torch, pretraining
from gptkit.base.cli import run_command
exec(code)
run_command(pretraining.PretrainingConfig, pretraining.launch)
"""


def drive(code: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run pretraining.py in a process of its own, after `code`."""
    driver = [sys.executable, "-c", DRIVER.format(root=str(ROOT)), code, *map(str, arguments)]
    return subprocess.run(driver, env=environment(), capture_output=True, encoding="utf-8", timeout=300)


@contextlib.contextmanager
def before_clipping(strike: Callable[[int, list[torch.Tensor]], None]) -> Iterator[None]:
    """Call `strike` with the number of the step in this session, from 1, and the parameters, whose gradients are whole."""
    clip, numbers = torch.nn.utils.clip_grad_norm_, itertools.count(1)

    def struck(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
        parameters = list(parameters)
        strike(next(numbers), parameters)
        return clip(parameters, max_norm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", struck)
        yield


def nan_at(steps: Collection[int]) -> contextlib.AbstractContextManager[None]:
    """Make the gradient NaN at these steps."""

    def strike(number: int, parameters: list[torch.Tensor]) -> None:
        if number in steps:
            parameters[0].grad.fill_(float("nan"))

    return before_clipping(strike)


def state_of(checkpoint: Path) -> dict:
    """Return what state.json of a checkpoint holds."""
    return json.loads((checkpoint / "state.json").read_bytes())


def test_a_step_that_is_not_finite_is_skipped(tmp_path: Path, short_shards: Path) -> None:
    arguments = (*small_run(short_shards, tmp_path / "out", "muon"), "--max_steps", 20)
    with nan_at({3, 4, 7}):
        result = call_command("pretraining.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is skipped, its loss is") == 3
    assert "(2 skipped so far, 2 in a row)" in result.stdout
    assert "(3 skipped so far, 1 in a row)" in result.stdout
    state = state_of(newest(tmp_path / "out"))
    assert (state["step"], state["n_skipped"], state["n_rollbacks"]) == (20, 3, 0)
    assert [report["step"] for report in curve(tmp_path / "out")] == [10, 20]


def test_a_run_that_diverges_rolls_back_with_half_of_the_rate(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    arguments = (
        *small_run(short_shards, output, "adamw"),
        "--max_steps",
        40,
        "--save_ckpt_freq",
        10,
        "--max_bad_steps",
        3,
    )
    with nan_at({24, 25, 26}):
        result = call_command("pretraining.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert "3 steps in a row, at step 26; going back to" in result.stdout
    assert "step_00000020 with 1/2 of the rate" in result.stdout
    assert [report["step"] for report in curve(output)] == [10, 20, 30, 40]  # none twice
    whole = tmp_path / "whole"
    assert call_command("pretraining.py", *small_run(short_shards, whole, "adamw"), "--max_steps", 40).returncode == 0
    rates = [report["lr"] for report in curve(output)]
    assert [a / b for a, b in zip(rates, [r["lr"] for r in curve(whole)], strict=True)] == [1, 1, 0.5, 0.5]
    assert state_of(newest(output))["n_rollbacks"] == 1


def test_a_run_that_diverges_stops_where_that_is_asked_for(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    arguments = (
        *small_run(short_shards, output, "adamw"),
        "--max_steps",
        40,
        "--save_ckpt_freq",
        10,
        "--max_bad_steps",
        3,
    )
    with nan_at({24, 25, 26}):
        stopped = call_command("pretraining.py", *arguments, "--on_divergence", "stop")
    assert_user_error(stopped, "not finite, 3 steps in a row, at step 26", "--lr")
    assert newest(output).name == "step_00000020"
    with nan_at(range(4, 1000)):
        for_good = call_command("pretraining.py", *arguments)
    assert_user_error(for_good, "not finite, 3 steps in a row", "--lr")
    assert for_good.stdout.count("going back to") == 3
    assert newest(output).name == "step_00000020"
    with nan_at(range(4, 1000)):
        nothing_saved = call_command("pretraining.py", *small_run(short_shards, tmp_path / "new", "adamw"))
    assert_user_error(nothing_saved, "no checkpoint to go back to")
    assert not list((tmp_path / "new").glob("step_*"))


def test_broken_weights_are_never_saved(tmp_path: Path, short_shards: Path) -> None:
    """The rate is so high that the weights overflow."""
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "adamw"), "--max_steps", 40, "--save_ckpt_freq", 1)
    result = call_command("pretraining.py", *arguments, "--lr", 1e38, "--warmup_steps", 0)
    assert_user_error(result, "not finite")
    assert not list(output.glob("step_*"))


@pytest.mark.slow
def test_a_batch_that_does_not_fit(tmp_path: Path, short_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than two sequences at once are refused memory."""
    arguments = (*small_run(short_shards, tmp_path / "out", "adamw"), "--max_steps", 2)
    hidden_states = GPTModel.hidden_states

    def limited(self: GPTModel, ids: torch.Tensor, *cache: Any) -> torch.Tensor:
        if len(ids) > 2:
            raise MemoryError
        return hidden_states(self, ids, *cache)

    with monkeypatch.context() as patch:
        patch.setattr(GPTModel, "hidden_states", limited)
        refused = call_command("pretraining.py", *arguments)
    assert_user_error(refused, "with --batch_size 4: --batch_size 2 --grad_accum_steps 4 fits", "--auto_batch")
    limit = """
from gpt_model import GPTModel
hidden_states = GPTModel.hidden_states
def limited(self, ids, *cache):
    if len(ids) > 2:
        raise MemoryError
    return hidden_states(self, ids, *cache)
GPTModel.hidden_states = limited
"""
    result = drive(limit, *arguments, "--auto_batch")
    assert result.returncode == 0, result.stderr
    state = state_of(newest(tmp_path / "out"))
    del state["plan"]["recipe"]
    assert state["plan"] == {"batch_size": 2, "grad_accum_steps": 4, "n_processes": 1}
    assert curve(tmp_path / "out")[-1]["tokens"] == 2 * 8 * 32  # the same tokens per step


def test_tokens_that_change_under_a_run(tmp_path: Path, short_shards: Path) -> None:
    """They are rewritten at step 15, and that is noticed before the next report or save; the same bytes do no harm."""
    output, tokens = tmp_path / "out", tmp_path / "tokens"
    shutil.copytree(short_shards.with_name("001_pretok"), tokens)

    def change(number: int, parameters: list[torch.Tensor]) -> None:
        if number == 15:
            path = sorted(tokens.glob("train_*.npy"))[0]
            content = path.read_bytes() if keep else path.read_bytes()[:-2] + b"\5\0"
            path.with_name("new").write_bytes(content)
            path.with_name("new").replace(path)

    arguments = (*small_run(short_shards, output, "adamw"), "--pretokenized_dir", tokens, "--max_steps", 30)
    keep = False
    with before_clipping(change):
        result = call_command("pretraining.py", *arguments, "--save_ckpt_freq", 10)
    assert_user_error(result, f"the token shards in {tokens} changed during the run")
    assert newest(output).name == "step_00000010"
    again = call_command("pretraining.py", *arguments, "--save_ckpt_freq", 10)
    assert again.returncode == 0, again.stderr
    assert newest(output).name == "step_00000030"
    keep = True
    with before_clipping(change):
        same = call_command("pretraining.py", *arguments, "--output_dir", tmp_path / "other")
    assert same.returncode == 0, same.stderr


def test_a_damaged_checkpoint_is_skipped(tmp_path: Path, short_shards: Path) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ("--max_steps", 30, "--save_ckpt_freq", 10)
    for folder in (output, whole):
        assert call_command("pretraining.py", *small_run(short_shards, folder, "muon"), *arguments).returncode == 0
    path = newest(output) / "training.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    result = call_command("pretraining.py", *small_run(short_shards, output, "muon"), *arguments)
    assert result.returncode == 0, result.stderr
    assert "step_00000030 is damaged (training.safetensors is not what was saved)" in result.stderr
    assert f"resuming from {output / 'step_00000020'}" in result.stdout
    assert (output / "step_00000030.damaged").is_dir()
    assert path.read_bytes() == (newest(whole) / "training.safetensors").read_bytes()
    assert curve(output) == curve(whole)


def test_which_settings_may_change_and_which_may_not(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    arguments = (*small_run(short_shards, output, "adamw"), "--max_steps", 2)
    assert call_command("pretraining.py", *arguments).returncode == 0
    may_not = {
        "--batch_size": (2, "number of sequences per step", "(8, now 4)"),
        "--optimizer": ("muon", "--optimizer", "(adamw, now muon)"),
        "--seed": (7, "--seed", "(123, now 7)"),
        "--val_fraction": (0.3, "--val_fraction", "(0.01, now 0.3)"),
        "--n_layers": (2, "model (--model_size, the dimensions or --drop_rate)"),
        "--drop_rate": (0.2, "model (--model_size, the dimensions or --drop_rate)"),
    }
    for flag, (value, *named) in may_not.items():
        assert_user_error(call_command("pretraining.py", *arguments, flag, value), "another", *map(str, named))
    other_text = Path(shutil.copytree(short_shards, tmp_path / "002"))
    with open(sorted(other_text.glob("*.txt"))[0], "a", encoding="utf-8") as file:
        file.write("雨が降る。<|endoftext|>")
    assert_user_error(call_command("pretraining.py", *arguments, "--data_dir", other_text), "text (--data_dir)")

    may = ("--max_steps", 4, "--lr", 0.001, "--eval_freq", 1, "--batch_size", 2, "--grad_accum_steps", 4)
    result = call_command("pretraining.py", *arguments, *may)
    assert result.returncode == 0, result.stderr
    assert "note: --lr was 0.003 and is 0.001: it holds from step 2 on" in result.stderr
    assert "note: --max_steps was 2 and is 4: the schedule stretches to the new length" in result.stderr
    assert [report["step"] for report in curve(output)] == [2, 3, 4]


@pytest.mark.slow
def test_saves_by_the_clock_change_nothing_but_the_folders(tmp_path: Path, short_shards: Path) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    for folder, more in ((output, ("--save_every_minutes", 1e-5, "--keep_checkpoints", 3)), (whole, ())):
        arguments = (*small_run(short_shards, folder, "muon"), "--max_steps", 25, "--save_ckpt_freq", 1000)
        assert call_command("pretraining.py", *arguments, *more).returncode == 0
    assert [path.name for path in sorted(output.glob("step_*"))][-3:] == [f"step_{n:08d}" for n in (23, 24, 25)]
    assert (newest(output) / "model.safetensors").read_bytes() == (newest(whole) / "model.safetensors").read_bytes()
    assert curve(output) == curve(whole)


def in_a_small_disk(tmp_path: Path, script: str) -> subprocess.CompletedProcess:
    """Run a shell script with a tmpfs of 16 MB at tmp_path/disk; skip the test where the system does not allow that."""
    (tmp_path / "disk").mkdir(exist_ok=True)
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
    mount = f"mount -t tmpfs -o size=16m none '{tmp_path}/disk'; "
    if not shutil.which("unshare") or subprocess.run([*namespace, mount], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    return subprocess.run(
        [*namespace, mount + script], env=environment(), capture_output=True, encoding="utf-8", timeout=300
    )


@pytest.mark.slow
def test_a_disk_that_fills_up_within_a_run(tmp_path: Path, short_shards: Path) -> None:
    """At step 12 something else fills the disk: saves fail, and the run continues to its end and reports that.

    With room again, the same command ends well, and as if nothing had happened.
    """
    disk, whole = tmp_path / "disk", tmp_path / "whole"
    fill = """
import itertools
clip, numbers = torch.nn.utils.clip_grad_norm_, itertools.count(1)
def fill(parameters, limit):
    if next(numbers) == 12:
        try:
            with open({path!r}, "wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        except OSError:
            pass
    return clip(parameters, limit)
torch.nn.utils.clip_grad_norm_ = fill
""".format(path=str(disk / "filler"))
    steps = ("--max_steps", 30, "--save_ckpt_freq", 10)
    arguments = (*small_run(short_shards, disk / "out", "muon"), *steps)
    (tmp_path / "driver.py").write_text(DRIVER.format(root=str(ROOT)))
    (tmp_path / "fill.py").write_text(fill)
    first = " ".join(f"'{part}'" for part in (sys.executable, tmp_path / "driver.py"))
    rest = " ".join(f"'{part}'" for part in arguments)
    again = " ".join(f"'{part}'" for part in command("pretraining.py", *arguments))
    result = in_a_small_disk(
        tmp_path,
        f"{first} \"$(cat '{tmp_path}/fill.py')\" {rest} && exit 9; echo code $? >&2; ls '{disk}/out' >&2; rm '{disk}/filler';"
        f" {again}; cp -r '{disk}/out' '{tmp_path}/saved'",
    )
    assert result.returncode == 0, result.stderr
    assert "warning: the checkpoint of step 20 could not be saved" in result.stdout
    assert "code 2" in result.stderr
    assert "step_00000010" in result.stderr
    assert "step_00000020" not in result.stderr.partition("code 2")[2].partition("going on")[0]
    assert f"resuming from {disk / 'out' / 'step_00000010'}" in result.stdout
    assert call_command("pretraining.py", *small_run(short_shards, whole, "muon"), *steps).returncode == 0
    saved = tmp_path / "saved"
    assert (newest(saved) / "model.safetensors").read_bytes() == (newest(whole) / "model.safetensors").read_bytes()
    assert curve(saved) == curve(whole)


@pytest.mark.slow
def test_a_disk_too_small_from_the_start(tmp_path: Path, short_shards: Path) -> None:
    wide = ("--emb_dim", 512, "--max_steps", 3)
    arguments = (*small_run(short_shards, tmp_path / "disk" / "out", "muon"), *wide)
    script = " ".join(f"'{part}'" for part in command("pretraining.py", *arguments))
    result = in_a_small_disk(tmp_path, script)
    assert_user_error(result, "MiB free and a checkpoint takes about", "make room")


def test_a_disk_that_is_read_only(tmp_path: Path, short_shards: Path) -> None:
    arguments = (*small_run(short_shards, tmp_path / "disk" / "out", "muon"), "--max_steps", 3)
    script = " ".join(f"'{part}'" for part in command("pretraining.py", *arguments))
    result = in_a_small_disk(tmp_path, f"mount -o remount,ro '{tmp_path}/disk'; {script}")
    assert_user_error(result, "read-only", "choose a folder that can be written to")
