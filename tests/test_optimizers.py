"""gptkit/optimizers.py: against torch.optim.AdamW, and a state that goes through a file without a trace."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt_model import GPTConfig, GPTModel
from gptkit import optimizers
from gptkit.command_line import UserError
from gptkit.losses import next_token_loss
from gptkit.optimizers import build_optimizer, load_optimizer_tensors, optimizer_tensors

NAMES = ("adamw", "galore_adamw")


@pytest.fixture(autouse=True)
def _small_galore(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subspace smaller than the tiny model's matrices, chosen anew at steps 0, 4, 8, …"""
    monkeypatch.setattr(optimizers, "GALORE", optimizers.GALORE | {"rank": 8, "update_proj_gap": 4})


def tiny_model() -> GPTModel:
    torch.manual_seed(0)
    return GPTModel(GPTConfig(vocab_size=97, context_length=16, emb_dim=32, n_layers=2, n_heads=4))


def train(model: GPTModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """One optimizer step a number of `steps`, on ids that depend on the number alone."""
    for step in steps:
        ids = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(step))
        next_token_loss(model(ids[:, :-1]), ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def without_gradient(model: GPTModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """One step on gradients of zero, which leaves only the decay to act; returns the weights from before."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return before


@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_is_in_one_group(name: str) -> None:
    model = tiny_model()
    groups = build_optimizer(model, name, 1e-3, 0.1).param_groups
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(parameter) for parameter in model.parameters()}


def test_adamw_decays_matrices_only() -> None:
    model = tiny_model()
    for parameter in model.parameters():  # biases begin at zero, where a decay would not show
        torch.nn.init.normal_(parameter)
    before = without_gradient(model, build_optimizer(model, "adamw", 0.1, 0.5))
    for name, parameter in model.named_parameters():
        expected = before[name] if "norm" in name or name.endswith("bias") else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected)


def test_galore_decays_nothing() -> None:
    model = tiny_model()
    before = without_gradient(model, build_optimizer(model, "galore_adamw", 0.1, 0.5))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def assert_steps_equal(
    model: GPTModel, ours: torch.optim.Optimizer, twin: GPTModel, theirs: torch.optim.Optimizer
) -> None:
    """Six steps of both on the same random gradients end at the same weights."""
    twins = dict(twin.named_parameters())
    for _ in range(6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            twins[name].grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, twins[name], atol=1e-6, rtol=1e-5)


def split(model: GPTModel, *endings: str) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """The parameters whose names end so, and the others."""
    named = list(model.named_parameters())
    return (
        [parameter for name, parameter in named if name.endswith(endings)],
        [parameter for name, parameter in named if not name.endswith(endings)],
    )


def test_adamw_equals_torch() -> None:
    model, twin = tiny_model(), tiny_model()
    matrices, vectors = split(twin, "emb.weight", "proj.weight", "qkv.weight")
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    assert_steps_equal(model, build_optimizer(model, "adamw", 3e-3, 0.3), twin, theirs)


def test_galore_equals_its_authors() -> None:
    from galore_torch import GaLoreAdamW

    model, twin = tiny_model(), tiny_model()
    projected, plain = split(twin, "proj.weight", "qkv.weight")
    galore = {"rank": 8, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": projected, **galore}, {"params": plain}]
    theirs = GaLoreAdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, no_deprecation_warning=True)
    assert_steps_equal(model, build_optimizer(model, "galore_adamw", 3e-3, 0.3), twin, theirs)


def test_galore_moves_block_matrices_in_a_subspace() -> None:
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, build_optimizer(model, "galore_adamw", 1e-2, 0.0), range(1))
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        assert change.abs().max() > 1e-4, name
        if parameter.dim() == 2:
            rank = torch.linalg.matrix_rank(change, rtol=1e-3)
            assert (rank <= 8) == ("trf_blocks" in name), (name, rank)


@pytest.mark.parametrize("n_done", [1, 3, 6, 8])  # three more steps cross a new subspace, at 4 or 8, or do not
@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_goes_on_as_if_never_saved(name: str, n_done: int, tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, name, 1e-2, 0.1)
    train(model, optimizer, range(n_done))
    weights = copy.deepcopy(model.state_dict())
    save_file(optimizer_tensors(model, optimizer), tmp_path / "state.safetensors")
    train(model, optimizer, range(n_done, n_done + 3))

    resumed = tiny_model()
    resumed.load_state_dict(weights)
    other = build_optimizer(resumed, name, 1e-2, 0.1)
    load_optimizer_tensors(resumed, other, load_file(tmp_path / "state.safetensors"))
    train(resumed, other, range(n_done, n_done + 3))
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    expected, found = optimizer_tensors(model, optimizer), optimizer_tensors(resumed, other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_state_names_its_parameters_and_misses_none(name: str) -> None:
    model = tiny_model()
    optimizer = build_optimizer(model, name, 1e-2, 0.1)
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(model, optimizer)
    for parameter in dict(model.named_parameters()):
        assert {f"exp_avg.{parameter}", f"exp_avg_sq.{parameter}", f"step.{parameter}"} <= tensors.keys()
    del tensors["exp_avg.pos_emb.weight"]
    with pytest.raises(KeyError, match=r"exp_avg\.pos_emb\.weight"):
        load_optimizer_tensors(model, optimizer, tensors)


def test_galore_that_is_not_installed_is_one_clear_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)  # an import of it then fails
    with pytest.raises(UserError, match=r"--optimizer galore_adamw needs galore-torch .*pip install galore-torch"):
        build_optimizer(tiny_model(), "galore_adamw", 1e-2, 0.0)
