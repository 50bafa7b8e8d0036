"""gptkit/training/compilation.py and --compile: a failure is a warning, nothing disturbs the run, a step has its cost."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SAMPLE_TOKENS, TINY_MODEL, call_command, run_command
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt_model import ARCHS, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.training.compilation import (
    BatchTooLarge,
    compile_and_time,
    find_batch_size,
    next_smaller_batch,
    oom_as_user_error,
    time_optimizer_step,
)
from gptkit.training.optimizers import build_optimizer
from gptkit.training.planning import flops_per_token

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VOCAB = 60  # of 64 rows
HiddenStates = Callable[[torch.Tensor], torch.Tensor]


def model_and_batch(**changes: object) -> tuple[GPTModel, tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(0)
    size = {"context_length": 8, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "drop_rate": 0.5}
    model = GPTModel(GPTConfig(VOCAB, **size | changes))
    ids = torch.randint(VOCAB, (3, 9))
    return model, (ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_random_streams_stay(dtype: torch.dtype) -> None:
    model, batch = model_and_batch()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    _, parts_s = compile_and_time(model, VOCAB, False, batch, CPU, dtype)
    assert list(parts_s) == ["forward", "backward"]
    assert all(0 < seconds < 60 for seconds in parts_s.values())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def assert_loss_of(model: GPTModel, loss: torch.Tensor, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_the_loss_is_the_models(arch: str) -> None:
    model, batch = model_and_batch(arch=arch)
    torch.nn.init.normal_(model.head_weight)
    loss_of_batch, _ = compile_and_time(model, VOCAB, False, batch, CPU, torch.float32)
    model.eval()
    assert_loss_of(model, loss_of_batch(*batch), batch)


def test_the_compiled_model_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def compiler(hidden_states: HiddenStates) -> HiddenStates:
        def compiled(ids: torch.Tensor) -> torch.Tensor:
            calls.append(ids)
            return hidden_states(ids)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    model, batch = model_and_batch(drop_rate=0.0)
    loss_of_batch, _ = compile_and_time(model, VOCAB, True, batch, CPU, torch.float32)
    calls.clear()
    assert_loss_of(model, loss_of_batch(*batch), batch)
    assert len(calls) == 1


def test_failure_to_compile_is_a_warning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The failure may come only when the compiled function is called."""

    def no_compiler(hidden_states: HiddenStates) -> HiddenStates:
        def compiled(ids: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no compiler was found\nand more lines")

        return compiled

    monkeypatch.setattr(torch, "compile", no_compiler)
    model, batch = model_and_batch(drop_rate=0.0)
    loss_of_batch, _ = compile_and_time(model, VOCAB, True, batch, CPU, torch.float32)
    assert_loss_of(model, loss_of_batch(*batch), batch)
    warning = capsys.readouterr().err
    assert warning == "warning: --compile failed (RuntimeError: no compiler was found); continuing without it\n"


@pytest.mark.usefixtures("sample_tokens")
@pytest.mark.parametrize(
    ("flags", "is_compiled"),
    [
        (("--budget_minutes", 30), True),
        (("--budget_minutes", 5), False),
        (("--budget_minutes", 30, "--no-compile"), False),
    ],
)
def test_a_run_with_time_for_it_is_compiled_on_the_cpu(
    tmp_path: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[object, ...], is_compiled: bool
) -> None:
    """Only training: validation would be compiled once more, since it computes no gradients."""
    with_gradients = []

    def compiler(hidden_states: HiddenStates) -> HiddenStates:
        def compiled(ids: torch.Tensor) -> torch.Tensor:
            with_gradients.append(torch.is_grad_enabled())
            return hidden_states(ids)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # without what earlier runs have found
    data = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--use_pretokenized", "--device", "cpu")
    few = ("--bigram_steps", 0, "--eval_freq", 1, "--eval_iter", 1, "--max_steps", 3, "--output_dir", tmp_path / "out")
    result = call_command("pretraining.py", *data, *TINY_MODEL, *few, *flags)
    assert result.returncode == 0, result.stderr
    assert "finished 3 steps" in result.stdout
    assert bool(with_gradients) == is_compiled
    assert all(with_gradients)


@pytest.mark.usefixtures("sample_tokens")
def test_a_budget_may_be_too_short_for_the_compiler_that_was_asked_for(
    tmp_path: Path, sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda hidden_states: hidden_states)
    data = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--use_pretokenized", "--device", "cpu")
    few = ("--bigram_steps", 0, "--eval_iter", 1, "--max_steps", 2, "--output_dir", tmp_path / "out")
    result = call_command("pretraining.py", *data, *TINY_MODEL, *few, "--budget_minutes", 0.5, "--compile")
    assert result.returncode == 0, result.stderr
    assert "finished 2 steps" in result.stdout


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
@pytest.mark.parametrize("compile", [False, True])
def test_out_of_memory_is_no_failure_to_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compile: bool, error: Exception
) -> None:
    def too_large(self: GPTModel, ids: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(GPTModel, "hidden_states", too_large)
    monkeypatch.setattr(torch, "compile", lambda hidden_states: hidden_states)
    model, batch = model_and_batch()
    with pytest.raises(type(error)):
        compile_and_time(model, VOCAB, compile, batch, CPU, torch.float32)
    assert capsys.readouterr().err == ""
    message = "out of memory with --batch_size 3: --batch_size 1 --grad_accum_steps 6 takes less, at the same tokens"
    with pytest.raises(BatchTooLarge, match=message) as caught, oom_as_user_error(3, 2):
        raise error
    assert caught.value.smaller_batch == 1


def test_a_smaller_batch_divides_the_larger() -> None:
    assert [next_smaller_batch(n) for n in (1, 2, 3, 7, 8, 12, 15)] == [None, 1, 1, 1, 4, 6, 5]
    tried: list[int] = []

    def run_micro_batch(n: int) -> None:
        tried.append(n)
        if n > 3:
            raise MemoryError

    assert find_batch_size(run_micro_batch, 24) == 3
    assert tried == [12, 6, 3]
    assert find_batch_size(run_micro_batch, 5) == 1
    assert find_batch_size(lambda n: run_micro_batch(9), 2) is None
    with pytest.raises(BatchTooLarge, match=r"with --batch_size 1: give a smaller --model_size or --context_length$"):
        raise BatchTooLarge(1, 4, None)


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: GPTModel, ids: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a bug")

    monkeypatch.setattr(GPTModel, "hidden_states", broken)
    model, batch = model_and_batch()
    with pytest.raises(RuntimeError, match="a bug"):
        compile_and_time(model, VOCAB, False, batch, CPU, torch.float32)
    with pytest.raises(RuntimeError, match="a bug"), oom_as_user_error(3, 1):
        raise RuntimeError("a bug")


@pytest.mark.parametrize("name", ["muon", "adamw", "galore_adamw"])
def test_measuring_an_optimizer_changes_nothing(name: str) -> None:
    """The weights, and the next steps, are those of a model on which no optimizer was measured."""
    results = []
    for measured in (False, True):
        model, (inputs, targets) = model_and_batch(drop_rate=0.0)
        optimizer = build_optimizer(model, name, 0.01, 0.01, 0.1)
        if measured:
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            assert (
                0
                < time_optimizer_step(model, functools.partial(build_optimizer, model, name, 0.01, 0.01, 0.1), CPU)
                < 60
            )
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            assert all(parameter.grad is None for parameter in model.parameters())
        for _ in range(2):
            F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        results.append(model.state_dict())
    assert all(torch.equal(tensor, results[1][name]) for name, tensor in results[0].items())


@pytest.mark.parametrize(("arch", "n_kv_heads"), [("gpt2", 0), ("modern", 0), ("modern", 1)])
def test_operations_per_token_are_those_that_torch_counts(arch: str, n_kv_heads: int) -> None:
    """They are those of forward and backward of full sequences, with attention by plain products."""
    model, (inputs, _) = model_and_batch(arch=arch, n_kv_heads=n_kv_heads, n_layers=3, drop_rate=0.0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        F.linear(model.hidden_states(inputs), model.head_weight).sum().backward()
    assert counter.get_total_flops() == flops_per_token(model.config) * inputs.numel()


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H200", torch.bfloat16, "40.4%"),
        ("NVIDIA GH200 480GB", torch.bfloat16, "40.4%"),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, "40.4%"),
        ("NVIDIA H100 PCIe", torch.bfloat16, "52.9%"),
        ("NVIDIA L40S", torch.bfloat16, "110.5%"),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, "128.2%"),
        ("NVIDIA A100-SXM4-80GB", torch.float16, "128.2%"),
        ("Tesla V100-SXM2-16GB", torch.float16, "320.0%"),
        ("NVIDIA H200", torch.float32, "n/a"),
        ("Some Other Device", torch.bfloat16, "n/a"),
        ("NVIDIA L40", torch.bfloat16, "n/a"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, "n/a"),
    ],
)
def test_utilization(name: str, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """4e14 operations per second are a share of the data sheets' 989, 756, 362 and 312 trillion."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert devices.format_mfu(4e14, CUDA, dtype) == expected
    assert devices.format_mfu(4e14, CPU, dtype) == "n/a"


@pytest.mark.slow
@pytest.mark.usefixtures("sample_tokens")
def test_compiled_run_and_its_checkpoint(tmp_path: Path, sample_shards: Path) -> None:
    """A compiled run learns what an eager one does, and its checkpoint has no prefixes: an eager run resumes from it."""
    data = (*SAMPLE_TOKENS, "--data_dir", sample_shards, "--use_pretokenized", "--device", "cpu")
    rate = ("--optimizer", "adamw", "--lr", 0.03, "--warmup_steps", 0, "--bigram_steps", 0)
    common = (*data, *TINY_MODEL, *rate, "--eval_freq", 2, "--eval_iter", 4, "--dtype", "float32")
    losses = {}
    for name, run in (("--compile", run_command), ("--no-compile", call_command)):
        output = ("--output_dir", tmp_path / name)
        result = run("pretraining.py", *common, *output, "--max_steps", 20, name)
        assert result.returncode == 0, result.stderr
        assert "warning" not in result.stderr
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        losses[name] = [json.loads(line)["val_loss"] for line in lines]
    assert losses["--compile"] == pytest.approx(losses["--no-compile"], abs=1e-4)
    assert losses["--compile"][-1] < losses["--compile"][0] - 0.3
    result = call_command("pretraining.py", *common, "--output_dir", tmp_path / "--compile", "--max_steps", 22)
    assert "resuming from" in result.stdout
    assert result.returncode == 0, result.stderr
