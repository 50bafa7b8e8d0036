"""gptkit/training/optimizers.py: against torch's AdamW, SVD and Muon and GaLore's authors; its state through a file."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gpt_model import ARCHS, GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.training import optimizers
from gptkit.training.muon import orthogonalize
from gptkit.training.optimizers import (
    HEAD_SHARE,
    VECTOR_SHARE,
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_schedules,
)
from gptkit.training.planning import n_block_parameters

NAMES = ("muon", "adamw", "galore_adamw")
LR, ADAM_LR, DECAY = 0.1, 0.02, 0.5
MUON_PEAKS = {"block": LR, "head": HEAD_SHARE * ADAM_LR, "embedding": ADAM_LR, "vector": VECTOR_SHARE * ADAM_LR}
# By optimizer, the peak rate of each kind of parameter and the kinds that decay.
PEAKS = {"muon": MUON_PEAKS, "adamw": dict.fromkeys(MUON_PEAKS, LR), "galore_adamw": dict.fromkeys(MUON_PEAKS, LR)}
DECAYED = {"muon": {"block"}, "adamw": {"block", "head", "embedding"}, "galore_adamw": set()}


@pytest.fixture(autouse=True)
def _small_galore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the subspace smaller than the tiny model's matrices, and choose it anew at steps 0, 4, 8, …"""
    monkeypatch.setattr(optimizers, "GALORE", optimizers.GALORE | {"rank": 8, "update_proj_gap": 4})


def tiny_model(arch: str = "gpt2") -> GPTModel:
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size=97, context_length=16, emb_dim=32, n_layers=2, n_heads=4, arch=arch))
    for parameter in model.parameters():
        if not parameter.any():  # it would hide a decay, or hold back other gradients
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def kinds_of(model: GPTModel) -> dict[str, str]:
    """Return the kind of each parameter by its name: "block" (a matrix of one), "head", "embedding" or "vector"."""
    head = "tok_emb.weight" if model.config.arch == "gpt2" else "out_head.weight"
    kinds = {"tok_emb.weight": "embedding", "pos_emb.weight": "embedding", head: "head"}
    return {n: kinds.get(n, "block" if p.dim() == 2 else "vector") for n, p in model.named_parameters()}


def block_matrices(model: GPTModel) -> dict[str, torch.nn.Parameter]:
    return {name: model.get_parameter(name) for name, kind in kinds_of(model).items() if kind == "block"}


def train(model: GPTModel, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Make one optimizer step per number in `steps`, on ids that depend on the number alone."""
    for step in steps:
        ids = torch.randint(97, (4, 17), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_each_parameter_is_in_one_group_of_its_settings(name: str, arch: str) -> None:
    model = tiny_model(arch)
    optimizer = build_optimizer(model, name, LR, ADAM_LR, DECAY)
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert found.keys() == {id(parameter) for parameter in model.parameters()}
    kinds = kinds_of(model)
    for parameter_name, parameter in model.named_parameters():
        group, kind = found[id(parameter)], kinds[parameter_name]
        assert group["peak_lr"] == PEAKS[name][kind], parameter_name
        assert group["weight_decay"] == (DECAY if kind in DECAYED[name] else 0), parameter_name
        assert (bool(group.get("muon")), "rank" in group) == (
            name == "muon" and kind == "block",
            name == "galore_adamw" and kind == "block",
        ), parameter_name


@pytest.mark.parametrize("arch", ARCHS)
def test_embedding_and_head_shrink_equally_by_the_decay_of_embeddings(arch: str) -> None:
    model = tiny_model(arch)
    optimizer = build_optimizer(model, "muon", LR, ADAM_LR, DECAY, embedding_decay=0.5)
    set_schedules(optimizer, 1.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    kinds = kinds_of(model)
    shares = {"block": 1 - LR * DECAY, "head": 1 - ADAM_LR * 0.5, "embedding": 1 - ADAM_LR * 0.5, "vector": 1.0}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, shares[kinds[name]] * before[name])


@pytest.mark.parametrize("arch", ARCHS)
def test_the_model_counts_as_block_parameters_what_muon_takes(arch: str) -> None:
    model = tiny_model(arch)
    blocks = build_optimizer(model, "muon", LR, ADAM_LR, DECAY).param_groups[0]["params"]
    assert sum(parameter.numel() for parameter in blocks) == n_block_parameters(model.config)


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_is_a_share_of_each_peak(name: str) -> None:
    model = tiny_model("modern")
    optimizer = build_optimizer(model, name, LR, ADAM_LR, DECAY)
    kinds = kinds_of(model)
    names = {id(parameter): parameter_name for parameter_name, parameter in model.named_parameters()}
    for share in (0.25, 1.0, 0.5):
        set_schedules(optimizer, share)
        for group in optimizer.param_groups:
            assert {share * PEAKS[name][kinds[names[id(p)]]] for p in group["params"]} == {group["lr"]}


@pytest.mark.parametrize("name", NAMES)
def test_the_decay_and_the_momentum_are_set_too(name: str) -> None:
    """Each decay as a multiple of the group's own: none grows from step to step."""
    optimizer = build_optimizer(tiny_model("modern"), name, LR, ADAM_LR, DECAY, embedding_decay=0.25)
    own = [group["weight_decay"] for group in optimizer.param_groups]
    for factor in (0.5, 2.0, 0.0, 1.0):
        set_schedules(optimizer, 1.0, factor, 0.9)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [factor * decay for decay in own]
    muon = [group["momentum"] for group in optimizer.param_groups if group.get("muon")]
    assert muon == ([0.9] if name == "muon" else [])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_without_a_gradient_only_the_decay_acts(name: str, arch: str) -> None:
    model = tiny_model(arch)
    optimizer = build_optimizer(model, name, LR, ADAM_LR, DECAY)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_schedules(optimizer, 1.0)
    optimizer.step()
    kinds = kinds_of(model)
    for parameter_name, parameter in model.named_parameters():
        decay = DECAY if kinds[parameter_name] in DECAYED[name] else 0
        expected = before[parameter_name] * (1 - LR * decay)
        torch.testing.assert_close(parameter.detach(), expected, msg=parameter_name)


def assert_steps_equal(
    model: GPTModel,
    ours: torch.optim.Optimizer,
    twin: GPTModel,
    theirs: torch.optim.Optimizer,
    blocks: bool = True,
) -> None:
    """Assert that six steps of both on the same random gradients give the same weights; block matrices only with `blocks`."""
    twins = dict(twin.named_parameters())
    for _ in range(6):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            twins[name].grad = parameter.grad.clone()
        ours.step()
        theirs.step()
    for name, parameter in model.named_parameters():
        if blocks or kinds_of(model)[name] != "block":
            torch.testing.assert_close(parameter, twins[name], atol=1e-6, rtol=1e-5)


def split(model: GPTModel, *endings: str) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the parameters whose names have one of these endings, and the others."""
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
    assert_steps_equal(model, build_optimizer(model, "adamw", 3e-3, ADAM_LR, 0.3), twin, theirs)


def matrix(n_rows: int, n_columns: int, smallest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random matrix of norm 1 whose singular values go down to `smallest`, and U V^T of its SVD."""
    drawn = torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, values, vh = torch.linalg.svd(drawn, full_matrices=False)
    values = torch.logspace(0, -1, len(values), dtype=torch.float64)
    values[-1] = 0
    values *= (1 - smallest**2) ** 0.5 / values.norm()
    values[-1] = smallest
    return ((u * values) @ vh).float(), (u @ vh).float()


# Polar Express with five steps leaves singular values between 0.876 and 1.123.
SLACK = 0.125
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("dtype", "smallest", "slack"),
    [
        *((torch.float32, smallest, SLACK) for smallest in (0.1, 0.01, 0.0011)),
        *((torch.bfloat16, smallest, SLACK + 0.01) for smallest in (0.1, 0.01)),  # smaller ones drown in its rounding
        *((torch.float16, smallest, SLACK + 0.01) for smallest in (0.1, 0.01)),
    ],
)
@pytest.mark.parametrize("shape", [(32, 32), (96, 32), (32, 80)])
def test_orthogonalize_equals_svd(shape: tuple[int, int], dtype: torch.dtype, smallest: float, slack: float) -> None:
    given, expected = matrix(*shape, smallest)
    found = orthogonalize(1e-5 * given[None], dtype)  # as small as a gradient, little of which float16 could hold
    assert found.shape == (1, *shape)
    assert found.dtype == torch.float32
    assert torch.linalg.matrix_norm(found[0] - expected, 2) < slack


def test_orthogonalize_treats_each_matrix_separately() -> None:
    """The norm of a matrix does not matter, also where it is zero."""
    matrices = torch.stack([scale * matrix(16, 24, 0.1)[0].roll(i, 0) for i, scale in enumerate((1, 0.01, 1e4))])
    for given, found in zip(matrices, orthogonalize(matrices), strict=True):
        torch.testing.assert_close(orthogonalize(given[None])[0], found)
        torch.testing.assert_close(orthogonalize(given[None] / given.norm())[0], found, atol=1e-3, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(2, 16, 24)), torch.zeros(2, 16, 24))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_muon_by_hand(arch: str, dtype: torch.dtype) -> None:
    """Compute three steps at changing rates, decays and momenta: momentum as a running mean, Nesterov's look-ahead, decay, the scale by shape."""
    model = tiny_model(arch)
    optimizer = build_optimizer(model, "muon", LR, ADAM_LR, DECAY, dtype)
    named = block_matrices(model)
    expected = {name: parameter.detach().clone() for name, parameter in named.items()}
    momentum = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    for step, (share, decay, beta) in enumerate(((0.5, 1.0, 0.95), (1.0, 2.0, 0.9), (0.2, 0.5, 0.85))):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 10.0**-step
        for name, parameter in named.items():
            momentum[name] = beta * momentum[name] + (1 - beta) * parameter.grad
            ahead = beta * momentum[name] + (1 - beta) * parameter.grad
            size = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
            update = size * orthogonalize(ahead[None], dtype)[0]
            expected[name] = expected[name] * (1 - share * LR * decay * DECAY) - share * LR * update
        set_schedules(optimizer, share, decay, beta)
        optimizer.step()
    for name, parameter in named.items():
        atol = (
            2e-5 if dtype == torch.float32 else 0.01 * LR
        )  # there a sum in another order may round to the next number
        torch.testing.assert_close(parameter.detach(), expected[name], atol=atol, rtol=1e-5, msg=name)


SCALINGS = ("none", "rows", "neurons")


def muon_step_by_hand(gradient: torch.Tensor, memory: dict[str, Any], scaling: str) -> torch.Tensor:
    """What Muon subtracts, over the rate, by the formulas of the papers; memory keeps the momentum and the row moments."""
    memory["m"] = 0.95 * memory.get("m", 0) + 0.05 * gradient
    ahead = 0.95 * memory["m"] + 0.05 * gradient
    if scaling == "rows":
        ahead = torch.stack([row / row.norm() for row in ahead])
    step = orthogonalize(ahead[None])[0]
    if scaling == "neurons":
        memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * (step**2).mean(1)
        balanced = torch.stack([row / v.sqrt() for row, v in zip(step, memory["v"], strict=True)])
        step = balanced * step.norm() / balanced.norm()
    return step * max(1.0, step.shape[0] / step.shape[1]) ** 0.5


def adam_step_by_hand(gradient: torch.Tensor, memory: dict[str, Any]) -> torch.Tensor:
    t = memory["t"] = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * gradient
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * gradient**2
    return memory["m"] / (1 - 0.9**t) / ((memory["v"] / (1 - 0.95**t)) ** 0.5 + 1e-8)


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("arch", ARCHS)
def test_variants_of_muon_by_hand(arch: str, scaling: Any, cautious: bool) -> None:
    """Three steps: cautious decay takes from a weight w, of which the step u is subtracted, only where u w >= 0."""
    model = tiny_model(arch)
    optimizer = build_optimizer(
        model, "muon", LR, ADAM_LR, DECAY, embedding_decay=0.3, cautious_decay=cautious, muon_scaling=scaling
    )
    own = {"block": DECAY, "embedding": 0.3, "head": 0.3 / HEAD_SHARE, "vector": 0.0}
    kinds, memories = kinds_of(model), {name: {} for name in kinds_of(model)}
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step, (share, factor) in enumerate(((0.5, 1.0), (1.0, 2.0), (0.2, 0.5))):
        drawn = torch.Generator().manual_seed(step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=drawn)
            if parameter.dim() == 2:
                parameter.grad *= torch.logspace(0, -1, len(parameter))[:, None]  # rows of unlike sizes
            is_block = kinds[name] == "block"
            update = (
                muon_step_by_hand(parameter.grad, memories[name], scaling)
                if is_block
                else adam_step_by_hand(parameter.grad, memories[name])
            )
            decays = torch.sign(update) * torch.sign(expected[name]) > -1 if cautious else True
            decay = factor * own[kinds[name]] * expected[name] * decays
            expected[name] = expected[name] - share * MUON_PEAKS[kinds[name]] * (update + decay)
        set_schedules(optimizer, share, factor)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], atol=3e-5, rtol=1e-5, msg=name)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5 * decay for decay in own.values()}


def test_neurons_begin_with_a_state_that_lacks_their_moments() -> None:
    """A run may turn them on when it resumes."""
    model = tiny_model()
    plain = build_optimizer(model, "muon", LR, ADAM_LR, DECAY)
    train(model, plain, range(2))
    tensors = optimizer_tensors(model, plain)
    turned_on = build_optimizer(model, "muon", LR, ADAM_LR, DECAY, muon_scaling="neurons")
    load_optimizer_tensors(model, turned_on, tensors)
    train(model, turned_on, range(2, 3))
    moments = optimizer_tensors(model, turned_on).keys() - tensors.keys()
    assert moments == {f"row_moment.{name}" for name in block_matrices(model)}


@pytest.mark.parametrize("arch", ARCHS)
def test_muon_moves_each_direction_equally(arch: str) -> None:
    """The first step is U V^T of the gradient's SVD, times sqrt(rows / columns) of a tall matrix."""
    model = tiny_model(arch)
    optimizer = build_optimizer(model, "muon", LR, ADAM_LR, 0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = {name: matrix(*parameter.shape, 0.01)[0] for name, parameter in block_matrices(model).items()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients.get(name, torch.ones_like(parameter)).clone()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name in gradients:
            u, _, vh = torch.linalg.svd(gradients[name], full_matrices=False)
            n_rows, n_columns = parameter.shape
            change = (before[name] - parameter.detach()) / LR / (n_rows / n_columns if n_rows > n_columns else 1) ** 0.5
            assert torch.linalg.matrix_norm(change - u @ vh, 2) < SLACK, name


@pytest.mark.parametrize("arch", ARCHS)
def test_muon_leaves_the_rest_to_adamw(arch: str) -> None:
    model, twin = tiny_model(arch), tiny_model(arch)
    kinds = kinds_of(twin)
    groups = [{"params": [p], "lr": MUON_PEAKS[kinds[n]]} for n, p in twin.named_parameters() if kinds[n] != "block"]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, foreach=False)
    ours = build_optimizer(model, "muon", LR, ADAM_LR, DECAY)
    set_schedules(ours, 1.0)
    assert_steps_equal(model, ours, twin, theirs, blocks=False)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_moves_as_torch_does() -> None:
    """torch iterates in bfloat16 by other polynomials, so that singular values end between 0.7 and 1.2."""
    model, twin = tiny_model("modern"), tiny_model("modern")
    blocks = block_matrices(twin)
    ours = build_optimizer(model, "muon", LR, ADAM_LR, DECAY)
    theirs = torch.optim.Muon(blocks.values(), lr=LR, weight_decay=DECAY, momentum=0.95, nesterov=True)
    for step in range(3):
        before = {name: (model.get_parameter(name).detach().clone(), p.detach().clone()) for name, p in blocks.items()}
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)) * 10.0**-step
            if name in blocks:
                blocks[name].grad = parameter.grad.clone()
        ours.step()
        theirs.step()
        for name, (mine, other) in before.items():
            change = (model.get_parameter(name).detach() - mine * (1 - LR * DECAY)).flatten()
            their_change = (blocks[name].detach() - other * (1 - LR * DECAY)).flatten()
            assert torch.cosine_similarity(change, their_change, dim=0) > 0.95, name
            assert change.norm() / their_change.norm() == pytest.approx(1.1, abs=0.2), name


def test_galore_equals_its_authors() -> None:
    from galore_torch import GaLoreAdamW

    model, twin = tiny_model(), tiny_model()
    projected, plain = split(twin, "proj.weight", "qkv.weight")
    galore = {"rank": 8, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": projected, **galore}, {"params": plain}]
    theirs = GaLoreAdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, no_deprecation_warning=True)
    assert_steps_equal(model, build_optimizer(model, "galore_adamw", 3e-3, ADAM_LR, 0.3), twin, theirs)


def test_galore_moves_block_matrices_in_a_subspace() -> None:
    model = tiny_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(model, build_optimizer(model, "galore_adamw", 1e-2, ADAM_LR, 0.0), range(1))
    for name, parameter in model.named_parameters():
        change = parameter.detach() - before[name]
        assert change.abs().max() > 1e-4, name
        if parameter.dim() == 2:
            rank = torch.linalg.matrix_rank(change, rtol=1e-3)
            assert (rank <= 8) == ("trf_blocks" in name), (name, rank)


@pytest.mark.parametrize("n_done", [1, 3, 6, 8])  # three more steps cross a new subspace, at 4 or 8, or do not
@pytest.mark.parametrize(
    ("name", "arch", "variants"),
    [
        *((name, "modern", {}) for name in NAMES),
        ("galore_adamw", "gpt2", {}),
        ("muon", "modern", {"muon_scaling": "neurons", "cautious_decay": True}),
    ],
)
def test_a_loaded_state_continues_as_if_never_saved(
    name: str, arch: str, variants: dict[str, Any], n_done: int, tmp_path: Path
) -> None:
    model = tiny_model(arch)
    optimizer = build_optimizer(model, name, 1e-2, 3e-3, 0.1, embedding_decay=0.1, **variants)
    train(model, optimizer, range(n_done))
    weights = copy.deepcopy(model.state_dict())
    save_file(optimizer_tensors(model, optimizer), tmp_path / "state.safetensors")
    train(model, optimizer, range(n_done, n_done + 3))

    resumed = tiny_model(arch)
    resumed.load_state_dict(weights)
    other = build_optimizer(resumed, name, 1e-2, 3e-3, 0.1, embedding_decay=0.1, **variants)
    load_optimizer_tensors(resumed, other, load_file(tmp_path / "state.safetensors"))
    train(resumed, other, range(n_done, n_done + 3))
    for key, value in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key
    expected, found = optimizer_tensors(model, optimizer), optimizer_tensors(resumed, other)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_state_names_all_its_parameters(name: str, arch: str) -> None:
    model = tiny_model(arch)
    optimizer = build_optimizer(model, name, 1e-2, 3e-3, 0.1)
    train(model, optimizer, range(1))
    tensors = optimizer_tensors(model, optimizer)
    expected = set()
    for parameter_name, parameter_kind in kinds_of(model).items():
        block = parameter_kind == "block"
        kinds = {"momentum"} if name == "muon" and block else {"exp_avg", "exp_avg_sq", "step"}
        kinds |= {"projector"} if name == "galore_adamw" and block else set()
        expected |= {f"{kind}.{parameter_name}" for kind in kinds}
    assert tensors.keys() == expected
    for missing in expected:
        with pytest.raises(KeyError, match=missing.replace(".", r"\.")):
            load_optimizer_tensors(model, optimizer, {key: value for key, value in tensors.items() if key != missing})


def test_galore_that_is_not_installed_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "galore_torch", None)  # an import of it then fails
    with pytest.raises(UserError, match=r"--optimizer galore_adamw needs galore-torch .*pip install galore-torch"):
        build_optimizer(tiny_model(), "galore_adamw", 1e-2, ADAM_LR, 0.0)
