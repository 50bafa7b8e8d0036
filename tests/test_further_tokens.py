"""gptkit/training/further_tokens.py: its gradients against torch's cross-entropy, and what a run keeps of it."""

from pathlib import Path

import pytest
import torch
from conftest import assert_user_error, call_command, newest, small_run
from safetensors.torch import load_file
from torch.nn import functional as F

from gpt_model import ARCHS, GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.training.compilation import make_loss
from gptkit.training.further_tokens import FurtherTokens, make_further_tokens
from gptkit.training.optimizers import FURTHER, build_optimizer, load_optimizer_tensors, optimizer_tensors

VOCAB = 97


def tiny_model(arch: str = "modern") -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(vocab_size=VOCAB, context_length=16, emb_dim=32, n_layers=2, n_heads=4, arch=arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_the_gradient_is_that_of_both_losses_and_the_value_that_of_the_first(arch: str) -> None:
    model, twin = tiny_model(arch), tiny_model(arch)
    further = FurtherTokens(model, 0.5)
    with torch.no_grad():
        further.projection.add_(0.1 * torch.randn(32, 32))
    theirs = further.projection.detach().clone().requires_grad_()
    ids = torch.randint(VOCAB, (3, 17))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    loss_of_batch = make_loss(model, model.hidden_states, VOCAB, further=further)

    further.set_weight(share_done=0.25)
    loss = loss_of_batch(inputs, targets)
    loss.backward()
    hidden = twin.hidden_states(inputs)
    first = F.cross_entropy(twin.logits(hidden).flatten(0, 1)[:, :VOCAB], targets.flatten())
    after_next = twin.logits((hidden @ theirs.T)[:, : 16 - 1])[..., :VOCAB]
    (first + 0.5 * 0.75 * F.cross_entropy(after_next.flatten(0, 1), ids[:, 2:].flatten())).backward()

    torch.testing.assert_close(loss, first)
    torch.testing.assert_close(further.projection.grad, theirs.grad)
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    with torch.no_grad():
        assert loss_of_batch(inputs, targets) == make_loss(model, model.hidden_states, VOCAB)(inputs, targets)


def test_the_projection_is_trained_as_the_matrices_and_may_begin_later() -> None:
    model = tiny_model()
    further = FurtherTokens(model, 0.5)
    optimizer = build_optimizer(model, "muon", 0.1, 0.02, 0.5, further=further.projection)
    (muon,) = (group for group in optimizer.param_groups if group["muon"])
    assert any(parameter is further.projection for parameter in muon["params"])
    for parameter in (*model.parameters(), further.projection):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert not torch.equal(further.projection, torch.eye(32))
    tensors = optimizer_tensors(model, optimizer)
    assert f"momentum.{FURTHER}" in tensors
    del tensors[f"momentum.{FURTHER}"]
    other = build_optimizer(model, "muon", 0.1, 0.02, 0.5, further=further.projection)
    load_optimizer_tensors(model, other, tensors)
    assert not other.state[further.projection]
    further.load({})
    assert torch.equal(further.projection, torch.eye(32))


def test_a_run_keeps_it_beside_its_model(tmp_path: Path, short_shards: Path) -> None:
    """Turned on for the last steps, and off again by the weight 0: no file of weights has it."""
    output = tmp_path / "out"
    run = small_run(short_shards, output, "muon")
    assert call_command("pretraining.py", *run, "--max_steps", 2).returncode == 0
    weights = load_file(newest(output) / "model.safetensors").keys()
    result = call_command("pretraining.py", *run, "--max_steps", 4, "--further_tokens", 0.5)
    assert result.returncode == 0, result.stderr
    assert "--further_tokens was 0.0 and is 0.5: it holds from step 2 on" in result.stderr
    training = load_file(newest(output) / "training.safetensors")
    assert training[FURTHER].shape == training[f"momentum.{FURTHER}"].shape == (32, 32)
    assert load_file(newest(output) / "model.safetensors").keys() == weights
    result = call_command("pretraining.py", *run, "--max_steps", 6, "--further_tokens", 0)
    assert result.returncode == 0, result.stderr
    assert not [name for name in load_file(newest(output) / "training.safetensors") if FURTHER in name]


def test_it_is_refused_where_it_cannot_be(tmp_path: Path, short_shards: Path) -> None:
    run = (*small_run(short_shards, tmp_path / "out", "muon"), "--max_steps", 2, "--further_tokens", 0.5)
    assert_user_error(
        call_command("pretraining.py", *run, "--context_length", 1), "--further_tokens", "--context_length"
    )
    with pytest.raises(UserError, match=r"--further_tokens 0.5 .*--parallel ddp"):
        make_further_tokens(tiny_model(), 0.5, 16, "fsdp")
    assert make_further_tokens(tiny_model(), 0.0, 16, "fsdp") is None
