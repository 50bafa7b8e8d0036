"""--dtype float16, for GPUs that do not multiply bfloat16: its loss scale, overflows, resuming, several processes.

The CPU multiplies float16 slowly but rightly. float32 is the reference.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, assert_user_error, call_command, curve, newest, save_experiment, small_run
from safetensors.torch import load_file
from test_guards import nan_at
from test_parallel import arguments, finish, start, torchrun

from gpt_model import GPTConfig, GPTModel
from gptkit.training import checkpoints
from gptkit.training.loading import load_checkpoint
from gptkit.training.loss import linear_cross_entropy
from gptkit.training.optimizers import build_optimizer
from gptkit.training.recipe import Recipe
from gptkit.training.run import Run

CPU = torch.device("cpu")
HALF = ("--dtype", "float16")
OVERFLOW = "is skipped: its scaled gradient overflowed float16; the loss scale is halved"


@contextmanager
def scaler(**settings: Any) -> Iterator[None]:
    """Let runs begin with another loss scale (init_scale), or raise it sooner (growth_interval)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, **settings))
        yield


def train(shards: Path, output: Path, *more: object) -> str:
    """Run pretraining.py on the CPU and return what it printed."""
    result = call_command("pretraining.py", *small_run(shards, output, "muon"), *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def state_of(output: Path) -> dict[str, Any]:
    return json.loads((newest(output) / "state.json").read_bytes())


@pytest.mark.slow
def test_300_steps_end_within_a_hundredth_of_float32(tmp_path: Path, short_shards: Path) -> None:
    more = ("--max_steps", 300, "--n_epochs", 9, "--batch_size", 2, "--bigram_steps", 0)
    more = (*more, "--eval_freq", 100, "--save_ckpt_freq", 300, "--print_sample_iter", 300)
    for dtype in ("float32", "float16"):
        printed = train(short_shards, tmp_path / dtype, *more, "--dtype", dtype)
        assert f", torch.{dtype}, " in printed
    wanted, found = curve(tmp_path / "float32"), curve(tmp_path / "float16")
    assert len(found) == 3
    assert found != wanted  # another precision
    for ours, theirs in zip(found, wanted, strict=True):
        for name in ("train_loss", "val_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=0.01), name
    assert found[0]["val_loss"] - found[-1]["val_loss"] > 0.15  # it learnt something
    weights = load_file(newest(tmp_path / "float16") / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def run_of(model: GPTModel, optimizer: str, dtype: torch.dtype) -> Run:
    settings = SimpleNamespace(grad_clip=1e9)
    built = build_optimizer(model, optimizer, 1e-3, 1e-3, 0.0, dtype)
    nothing: Any = None
    plan, batches = SimpleNamespace(recipe=Recipe()), SimpleNamespace(steps_per_epoch=1)
    parts = settings, nothing, nothing, plan, nothing, batches, nothing
    return Run(*parts, model, built, CPU, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ["modern", "gpt2"])
def test_gradients_are_unscaled_once(arch: str) -> None:
    """After two micro-steps and the clipping they are float32's, and the next step's too."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=90, context_length=16, emb_dim=32, n_layers=2, n_heads=2, arch=arch))
    batches = torch.randint(90, (2, 3, 17))
    gradients = {}
    for dtype in (torch.float32, torch.float16):
        run = run_of(model, "muon", dtype)
        for _ in range(2):
            model.zero_grad()
            for ids in batches:
                with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
                    hidden = model.hidden_states(ids[:, :-1])
                    loss = linear_cross_entropy(hidden, model.head_weight, ids[:, 1:], 90) / len(batches)
                run.scaler.scale(loss).backward()
            norm = run.clip_gradients()
        gradients[dtype] = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert norm.item() == pytest.approx(gradients[dtype].norm().item())
    wanted, found = gradients.values()
    assert (found - wanted).norm() < 0.005 * wanted.norm()
    assert found.dtype == torch.float32
    assert not torch.equal(found, wanted)


def test_overflows_are_survived_and_are_no_bad_steps(tmp_path: Path, short_shards: Path) -> None:
    """A scale of 2^40 overflows until it has been halved often enough; before that no weight of any group moves."""
    output, first = tmp_path / "out", tmp_path / "first"
    patient = (*HALF, "--max_bad_steps", 1, "--bigram_steps", 0)
    with scaler(init_scale=2.0**40):
        for n_steps in (1, 3):
            train(short_shards, first, *patient, "--max_steps", n_steps)
        printed = train(short_shards, output, *patient, "--max_steps", 60)
    weights = [(first / f"step_{n_steps:08}" / "model.safetensors").read_bytes() for n_steps in (1, 3)]
    assert weights[0] == weights[1]
    n_overflows = printed.count(OVERFLOW)
    assert 10 < n_overflows < 35
    assert all(f"step {step} {OVERFLOW}" in printed for step in range(2, 12))  # the first one's gradient is finite
    assert "warning" not in printed
    assert (state_of(output)["n_skipped"], state_of(output)["n_skipped_in_a_row"]) == (0, 0)
    assert state_of(output)["scaler"]["scale"] == 2.0 ** (40 - n_overflows)
    assert "grad_norm" not in curve(output)[0]  # of step 10, which was skipped; JSON has no NaN
    assert "grad_norm" in curve(output)[-1]
    page = ("--exp_dir", output, "--output", tmp_path / "report.html")
    assert call_command("report.py", *page).returncode == 0
    assert curve(output)[-1]["val_loss"] < curve(output)[0]["val_loss"] - 0.03


def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Path, short_shards: Path) -> None:
    """The scale is raised every third step and soon overflows, before and after the stop."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    more = (*HALF, "--max_steps", 40)
    with scaler(init_scale=2.0**22, growth_interval=3):
        printed = train(short_shards, whole, *more)
        train(short_shards, stopped, *more, "--max_minutes", 1e-5)
        assert state_of(stopped)["step"] < 5
        growth = state_of(stopped)["scaler"]
        later = train(short_shards, stopped, *more)
    assert growth != state_of(whole)["scaler"]
    assert printed.count(OVERFLOW) > 3
    assert later.count(OVERFLOW) > 3
    assert state_of(whole)["scaler"] == state_of(stopped)["scaler"]
    assert curve(whole) == curve(stopped)
    for file in ("model.safetensors", "training.safetensors"):
        assert (newest(stopped) / file).read_bytes() == (newest(whole) / file).read_bytes(), file


def test_a_run_changes_its_precision_on_the_way(tmp_path: Path, short_shards: Path) -> None:
    """Into float16, whose scale then begins anew, and out of it."""
    output = tmp_path / "out"
    for n_steps, dtype, has_scaler in ((10, "float32", False), (20, "float16", True), (30, "bfloat16", False)):
        train(short_shards, output, "--max_steps", n_steps, "--dtype", dtype)
        assert state_of(output)["step"] == n_steps
        assert ("scaler" in state_of(output)) == has_scaler


DAMAGE = [
    None, {}, {"scale": 0.0}, {"scale": -1.0}, {"scale": 1e-300}, {"scale": 1e300}, {"scale": 10**400},
    {"_growth_tracker": -1}, {"_growth_tracker": 2**40},
]  # fmt: skip


def test_a_damaged_scale_is_refused(tmp_path: Path, short_shards: Path) -> None:
    output = tmp_path / "out"
    train(short_shards, output, *HALF, "--max_steps", 1)
    checkpoint, state = newest(output), state_of(output)
    for damage in DAMAGE:
        damaged = state["scaler"] | damage if damage else damage
        (checkpoint / "state.json").write_text(json.dumps(state | {"scaler": damaged}), "utf-8")
        checkpoints.write_checksums(checkpoint, [path for path in checkpoint.rglob("*.*") if path.is_file()])
        result = call_command("pretraining.py", *small_run(short_shards, output, "muon"), *HALF, "--max_steps", 2)
        assert_user_error(result, "is damaged")


def test_a_rollback_to_another_precision_begins_with_the_first_scale(tmp_path: Path, short_shards: Path) -> None:
    """Gradients that were infinite at any scale had brought it far down."""
    output = tmp_path / "out"
    train(short_shards, output, "--dtype", "float32", "--max_steps", 3)

    class Infinite(torch.amp.GradScaler):
        n_steps = 0

        def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
            Infinite.n_steps += 1
            if Infinite.n_steps <= 5:
                optimizer.param_groups[0]["params"][0].grad.fill_(torch.inf)
            super().unscale_(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(Infinite, init_scale=4.0))
        result = call_command(
            "pretraining.py", *small_run(short_shards, output, "muon"), *HALF, "--max_bad_steps", 3, "--max_steps", 9
        )
    assert result.returncode == 0, result.stderr
    assert "going back to" in result.stdout
    assert state_of(output)["scaler"]["scale"] == 4.0
    assert state_of(output)["n_skipped"] == 3


def test_a_gradient_that_no_scale_can_save_is_a_divergence(tmp_path: Path, short_shards: Path) -> None:
    """One after the unscaling, which the scaler does not see; and one that is infinite at any scale, 4, 2, 1, 0.5 …"""
    more = (*HALF, "--on_divergence", "stop", "--max_bad_steps", 4, "--max_steps", 9)
    small = small_run(short_shards, tmp_path / "nan", "muon")
    with nan_at(range(3, 100)):
        assert_user_error(call_command("pretraining.py", *small, *more), "not finite, 4 steps in a row, at step 6")

    class Infinite(torch.amp.GradScaler):
        def scale(self, outputs: Any) -> Any:
            return torch.inf * super().scale(outputs)

    small = small_run(short_shards, tmp_path / "infinite", "muon")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.amp, "GradScaler", partial(Infinite, init_scale=4.0))
        result = call_command("pretraining.py", *small, *more)
    assert_user_error(result, "not finite, 4 steps in a row, at step 6")
    assert result.stdout.count(OVERFLOW) == 2


# A rank whose shard of a gradient is infinite at step 3: the others must skip it too, and halve their scale.
UNLIKE = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import pretraining
from gptkit.training import saver

class Scaler(torch.amp.GradScaler):
    n_calls = 0

    def unscale_(self, optimizer):
        self.n_calls += 1
        if self.n_calls == 3 and os.environ["RANK"] == "1":
            gradient = optimizer.param_groups[0]["params"][0].grad
            getattr(gradient, "to_local", lambda: gradient)().fill_(torch.inf)
        super().unscale_(optimizer)

torch.amp.GradScaler = Scaler
finish = saver.Saver.finish

def finish_and_write(self):
    finish(self)
    with open({folder!r} + "/scale_" + os.environ["RANK"], "w") as file:
        file.write(str(self.run.loss_scale))

saver.Saver.finish = finish_and_write
pretraining.process_group.silence_other_ranks()
pretraining.run_command(pretraining.PretrainingConfig, pretraining.launch)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="several processes, as torchrun starts them, need POSIX here")
def test_two_processes_overflow_together(tmp_path: Path, short_shards: Path) -> None:
    """Sharded, only one of them has the infinite part; the run is that of one process in float32, less a step."""
    alone = call_command("pretraining.py", *arguments(short_shards, tmp_path / "alone", 4, "--dtype", "float32"))
    assert alone.returncode == 0, alone.stderr
    script, output = tmp_path / "unlike.py", tmp_path / "out"
    script.write_text(UNLIKE.format(root=str(ROOT), folder=str(tmp_path)), "utf-8")
    more = ("--parallel", "fsdp", *HALF)
    result = finish(start(torchrun(2, *arguments(short_shards, output, 2, *more), script=script)))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(f"step 3 {OVERFLOW}") == 1
    assert [(tmp_path / f"scale_{rank}").read_text() for rank in range(2)] == ["32768.0"] * 2
    assert "warning" not in result.stderr
    for ours, theirs in zip(curve(output), curve(tmp_path / "alone"), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=0.02)


def test_a_text_from_activations_that_overflow_is_refused(tmp_path: Path, poem: tuple[Path, str]) -> None:
    """float16 ends at 65,504; in float32 the same weights generate."""
    model, tokenizer = load_checkpoint(newest(poem[0] / "model_checkpoints"), GPTModel.from_dimensions, CPU)
    model.tok_emb.weight.data *= 1e6
    folder = save_experiment(tmp_path / "exp", model, tokenizer)
    text = ("--exp_dir", folder, "--prompt", "春", "--max_new_tokens", 3, "--temperature", 0)
    assert call_command("inference.py", *text, "--dtype", "float32").returncode == 0
    result = call_command("inference.py", *text, *HALF)
    assert_user_error(result, "overflow float16", "--dtype float32")
