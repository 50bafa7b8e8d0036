"""gptkit/training/characters.py: which tokens share what, and the step against AdamW over sums of vectors."""

from pathlib import Path

import pytest
import torch
from conftest import call_command, newest, small_run
from safetensors.torch import load_file
from test_optimizers import tiny_model

from gpt_model import GPTConfig, GPTModel
from gptkit.training.characters import Bags, SharedCharacters, characters_of, share_characters
from gptkit.training.muon import CHARACTER_STATE
from gptkit.training.optimizers import (
    build_optimizer,
    load_optimizer_tensors,
    optimizer_tensors,
    set_schedules,
    state_bytes,
)

TOKENS = ["", "", "猫", "猫が", "子猫", "が", "\ufffd", "猫猫", "食べる", "食べた"]
SHARE, ADAM_LR, DECAY = 0.5, 0.02, 0.3


def matrix_of(bags: Bags, n_columns: int) -> torch.Tensor:
    """Return the matrix whose product with rows is what the bags sum."""
    return bags.sum(torch.eye(n_columns))


def test_tokens_share_their_first_their_last_and_each_character() -> None:
    found = share_characters(TOKENS, 12)
    matrix = matrix_of(found.of_rows, found.n_shared)  # (12, F)
    assert torch.equal(matrix.T, matrix_of(found.of_shared, 12))
    in_common = matrix @ matrix.T
    row = {token: number for number, token in enumerate(TOKENS)}
    # First, last, and each kind of character; then the scripts of first, last and all, and the length.
    assert matrix.sum(1).tolist() == [n and n + 4 for n in (0, 0, 3, 4, 4, 3, 0, 3, 5, 5, 0, 0)]
    assert in_common[row["猫"], row["猫が"]] == 2 + 1  # first, any; script of the first
    assert in_common[row["猫"], row["子猫"]] == 2 + 2  # last, any; scripts of first and last
    assert in_common[row["猫が"], row["子猫"]] == 1 + 2  # any; script of the first, length
    assert in_common[row["猫"], row["猫猫"]] == 3 + 2  # however often it occurs: a run of blanks would move too far
    assert in_common[row["食べる"], row["食べた"]] == 3 + 4
    assert in_common[row["が"], row["子猫"]] == 0


def test_bags_may_be_empty() -> None:
    found = share_characters(["", "\ufffd"], 3)
    assert found.n_shared == 0
    assert torch.equal(found.of_rows.sum(torch.zeros(0, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize(("arch", "name"), [("gpt2", "tok_emb"), ("modern", "tok_emb"), ("modern", "out_head")])
def test_the_step_is_that_of_adamw_over_sums_of_vectors(arch: str, name: str) -> None:
    """A row is the sum of its own vector and the shared ones: two matrices that torch's AdamW trains, all decaying alike."""
    model = tiny_model(arch)
    parameter = model.get_parameter(f"{name}.weight")
    shared = share_characters(TOKENS * 5, len(parameter))
    options = {"embedding_decay": DECAY, "share_characters": SHARE, "characters": shared}
    optimizer = build_optimizer(model, "muon", 0.1, ADAM_LR, 0.0, **options)
    set_schedules(optimizer, 1.0)
    (group,) = [each for each in optimizer.param_groups if any(p is parameter for p in each["params"])]
    matrix = matrix_of(shared.of_rows, shared.n_shared)
    own = parameter.detach().clone().requires_grad_()
    common = torch.zeros(shared.n_shared, parameter.size(1), requires_grad=True)
    lr, decay = group["peak_lr"], group["weight_decay"]
    assert decay > 0
    groups = [
        {"params": [own], "lr": lr, "weight_decay": decay},
        {"params": [common], "lr": SHARE * lr, "weight_decay": decay / SHARE},
    ]
    reference = torch.optim.AdamW(groups, betas=group["betas"], eps=group["eps"])
    for step in range(6):
        gradient = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        for other in model.parameters():
            other.grad = torch.zeros_like(other)
        parameter.grad, own.grad, common.grad = gradient.clone(), gradient.clone(), matrix.T @ gradient
        optimizer.step()
        reference.step()
    torch.testing.assert_close(parameter.detach(), (own + matrix @ common).detach(), rtol=1e-4, atol=1e-5)


def test_positions_share_nothing() -> None:
    """Also where there are as many as tokens."""
    model = GPTModel(GPTConfig(vocab_size=64, context_length=64, emb_dim=32, n_layers=1, n_heads=4, arch="gpt2"))
    assert model.pos_emb.weight.shape == model.tok_emb.weight.shape
    shared = share_characters(TOKENS, len(model.tok_emb.weight))
    optimizer = build_optimizer(model, "muon", 0.1, ADAM_LR, 0.0, share_characters=SHARE, characters=shared)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    sharing = [names[id(p)] for g in optimizer.param_groups for p in g["params"] if g.get("character_share")]
    assert sharing == ["tok_emb.weight"]


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    """Return the parameters after steps whose gradients depend on their numbers alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_schedules(optimizer, 1.0)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_state_goes_through_a_file() -> None:
    def build() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = tiny_model("modern")
        shared: SharedCharacters = share_characters(TOKENS, len(model.tok_emb.weight))
        return model, build_optimizer(model, "muon", 0.1, 0.02, 0.1, share_characters=SHARE, characters=shared)

    whole_model, whole = build()
    expected = trained(whole_model, whole, range(4))
    model, optimizer = build()
    trained(model, optimizer, range(2))
    weights, tensors = model.state_dict(), optimizer_tensors(model, optimizer)
    assert {name.partition(".")[0] for name in tensors} >= set(CHARACTER_STATE)
    second_model, second = build()
    second_model.load_state_dict(weights)
    load_optimizer_tensors(second_model, second, tensors)
    assert all(map(torch.equal, trained(second_model, second, range(2, 4)), expected))


def test_the_estimate_of_the_state_counts_what_is_shared() -> None:
    model = tiny_model("modern")
    shared = share_characters(TOKENS, len(model.tok_emb.weight))
    estimates, found = [], 0
    for share in (0.0, SHARE):
        optimizer = build_optimizer(model, "muon", 0.1, 0.02, 0.1, share_characters=share, characters=shared)
        trained(model, optimizer, range(1))
        state = optimizer_tensors(model, optimizer)
        found = sum(tensor.nbytes for name, tensor in state.items() if name.startswith(CHARACTER_STATE))
        estimates.append(state_bytes(optimizer))
    assert estimates[1] - estimates[0] == found > 0


def test_moments_of_other_tokens_are_dropped() -> None:
    """As where another version of a tokenizer's library decodes otherwise."""
    model = tiny_model("modern")
    state: dict[str, torch.Tensor] = {}
    for tokens in (TOKENS, TOKENS[:-1]):
        shared = share_characters(tokens, len(model.tok_emb.weight))
        optimizer = build_optimizer(model, "muon", 0.1, 0.02, 0.1, share_characters=SHARE, characters=shared)
        if state:
            load_optimizer_tensors(model, optimizer, state)
        trained(model, optimizer, range(2))
        state = optimizer_tensors(model, optimizer)
        assert len(state[f"{CHARACTER_STATE[0]}.tok_emb.weight"]) == shared.n_shared


def test_the_marks_of_wordpiece_are_no_characters() -> None:
    class WordPiece:
        vocab_size = 3

        def decode(self, ids: list[int]) -> str:
            return ["で", "##で", "##"][ids[0]]

    found = characters_of(WordPiece(), 4, torch.device("cpu"))  # type: ignore[arg-type]
    assert matrix_of(found.of_rows, found.n_shared).tolist() == [[1] * 7, [1] * 7, [0] * 7, [0] * 7]


def test_it_may_be_turned_on_and_off_in_a_run(short_shards: Path, tmp_path: Path) -> None:
    run = small_run(short_shards, tmp_path / "out", "muon")
    for n_steps, share in ((2, 0), (4, SHARE), (6, 0)):
        result = call_command("pretraining.py", *run, "--max_steps", n_steps, "--share_characters", share)
        assert result.returncode == 0, result.stderr
        state = load_file(newest(tmp_path / "out") / "training.safetensors")
        kept = [name for name in state if name.startswith(CHARACTER_STATE)]
        assert len(kept) == (4 if share else 0)  # of embedding and head
