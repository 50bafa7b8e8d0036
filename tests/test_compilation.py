"""gptkit/compilation.py and --compile: a warning where it fails, and nothing of the run disturbed."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE_TOKENIZER, run_command

from gpt_model import GPTConfig, GPTModel
from gptkit.command_line import UserError
from gptkit.compilation import compile_and_try, memory_told

CPU = torch.device("cpu")


def model_and_batch() -> tuple[GPTModel, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(64, context_length=8, emb_dim=16, n_layers=1, n_heads=2, drop_rate=0.5))
    ids = torch.randint(64, (3, 9))
    return model, (ids[:, :-1], ids[:, 1:])


def test_weights_gradients_and_random_streams_stay() -> None:
    model, batch = model_and_batch()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    forward, seconds = compile_and_try(model, False, batch, CPU, torch.float32)
    assert forward is model
    assert 0 < seconds < 60
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_failure_to_compile_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_compiler(model: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError("no compiler was found\nand more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    model, batch = model_and_batch()
    forward, _ = compile_and_try(model, True, batch, CPU, torch.float32)
    assert forward is model
    warning = capsys.readouterr().err
    assert warning == "warning: --compile failed (RuntimeError: no compiler was found); going on without\n"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("compile", [False, True])
def test_out_of_memory_is_no_failure_to_compile(
    monkeypatch: pytest.MonkeyPatch, compile: bool, error: Exception
) -> None:
    def too_large(self: GPTModel, ids: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(GPTModel, "forward", too_large)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    model, batch = model_and_batch()
    with pytest.raises(type(error)):
        compile_and_try(model, compile, batch, CPU, torch.float32)
    message = "--batch_size 3: give 1 and twice the --grad_accum_steps"
    with pytest.raises(UserError, match=message), memory_told(3):
        raise error


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GPTModel, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(GPTModel, "forward", broken)
    model, batch = model_and_batch()
    with pytest.raises(RuntimeError, match="a bug"):
        compile_and_try(model, False, batch, CPU, torch.float32)


def test_compiled_run_and_its_checkpoint(tmp_path: Path, sample_shards: Path) -> None:
    """A compiled run learns what an eager one does, and its checkpoint has no prefixes: an eager run goes on from it."""
    flags = ("--tokenizer", "sentencepiece", "--tokenizer_path", SAMPLE_TOKENIZER, "--data_dir", sample_shards)
    size = ("--n_layers", 1, "--emb_dim", 16, "--n_heads", 1, "--context_length", 16, "--batch_size", 2)
    common = (*flags, *size, "--lr", 0.01, "--warmup_steps", 0, "--eval_freq", 2, "--eval_iter", 4)
    losses = {}
    for name in ("--compile", "--no-compile"):
        output = ("--output_dir", tmp_path / name)
        result = run_command("pretraining.py", *common, *output, "--max_steps", 20, name)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        losses[name] = [json.loads(line)["val_loss"] for line in lines]
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], abs=1e-4)
    assert losses["--compile"][-1] < losses["--compile"][0] - 0.3
    result = run_command("pretraining.py", *common, "--output_dir", tmp_path / "--compile", "--max_steps", 22)
    assert "going on from" in result.stdout
    assert result.returncode == 0, result.stderr
