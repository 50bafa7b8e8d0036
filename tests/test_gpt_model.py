"""gpt_model.py: GPT-2 against transformers' GPT-2 and known parameter counts, and what must hold for any causal model.

Tests of what only arch modern has are in test_modern_model.py.
"""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt_model import PRESETS, CausalSelfAttention, GPTConfig, GPTModel, rotary_tables

VOCAB, CONTEXT = 97, 24  # 97 ids are padded to 128 rows
both_archs = pytest.mark.parametrize("arch", ["gpt2", "modern"])


def tiny_config(**changes: float | str) -> GPTConfig:
    return GPTConfig(
        **{"vocab_size": VOCAB, "context_length": CONTEXT, "emb_dim": 48, "n_layers": 3, "n_heads": 4} | changes
    )


def random_model(seed: int = 0, **changes: float | str) -> GPTModel:
    """Return a tiny model in evaluation mode. All its weights are random, so that a misplaced norm or bias shows."""
    torch.manual_seed(seed)
    model = GPTModel(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.3
    return model


def random_ids(n_sequences: int = 2, n_tokens: int = CONTEXT, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (n_sequences, n_tokens), generator=torch.Generator().manual_seed(seed))


def hugging_face_twin(model: GPTModel) -> nn.Module:
    """Return transformers' GPT2LMHeadModel with the weights of `model`, without the rows that pad the vocabulary."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = model.config
    twin = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.context_length,
            n_embd=config.emb_dim,
            n_layer=config.n_layers,
            n_head=config.n_heads,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    ).eval()

    def norm(prefix: str, module: nn.LayerNorm) -> dict[str, torch.Tensor]:
        return {f"{prefix}.weight": module.weight, f"{prefix}.bias": module.bias}

    def conv1d(prefix: str, module: nn.Linear) -> dict[str, torch.Tensor]:  # GPT-2's weights are (inputs, outputs)
        bias = torch.zeros(module.out_features) if module.bias is None else module.bias
        return {f"{prefix}.weight": module.weight.t(), f"{prefix}.bias": bias}

    weights = {"wte.weight": model.tok_emb.weight[: config.vocab_size], "wpe.weight": model.pos_emb.weight}
    weights |= norm("ln_f", model.final_norm)
    for i, block in enumerate(model.trf_blocks):
        weights |= norm(f"h.{i}.ln_1", block.norm1) | norm(f"h.{i}.ln_2", block.norm2)
        weights |= conv1d(f"h.{i}.attn.c_attn", block.att.qkv) | conv1d(f"h.{i}.attn.c_proj", block.att.out_proj)
        weights |= conv1d(f"h.{i}.mlp.c_fc", block.ff.up_proj) | conv1d(f"h.{i}.mlp.c_proj", block.ff.out_proj)
    twin.transformer.load_state_dict(weights)
    return twin


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"vocab_multiple": 1}, {"n_heads": 1}], ids=str)
def test_logits_equal_transformers(changes: dict[str, float]) -> None:
    model, ids = random_model(**changes), random_ids()
    with torch.no_grad():
        ours, theirs = model(ids), hugging_face_twin(model)(ids).logits
    assert ours.shape == (2, CONTEXT, model.config.padded_vocab_size)
    assert theirs.std() > 1  # so that 1e-4 means something
    assert (ours[..., :VOCAB] - theirs).abs().max() < 1e-4


@both_archs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_ids_have_no_probability_and_no_gradient(dtype: torch.dtype, arch: str) -> None:
    model, ids = random_model(arch=arch), random_ids(4, CONTEXT + 1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = model(ids[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert logits.dtype == dtype
    assert loss.isfinite()
    probabilities = logits.float().softmax(dim=-1)
    assert (probabilities[..., VOCAB:] == 0).all()
    assert (probabilities[..., :VOCAB].sum(dim=-1) - 1).abs().max() < 1e-5
    gradient = model.head_weight.grad
    assert (gradient[VOCAB:] == 0).all()
    assert (gradient[:VOCAB].abs().sum(dim=1) > 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@both_archs
@pytest.mark.parametrize("vocab_multiple", [64, 1])
def test_logits_are_hidden_states_times_head_weight(vocab_multiple: int, arch: str) -> None:
    model, ids = random_model(vocab_multiple=vocab_multiple, arch=arch), random_ids()
    with torch.no_grad():
        logits, hidden_states = model(ids), model.hidden_states(ids)
    assert hidden_states.shape == (2, CONTEXT, 48)
    expected = hidden_states @ model.head_weight.T
    torch.testing.assert_close(logits[..., :VOCAB], expected[..., :VOCAB], atol=1e-5, rtol=1e-5)
    assert (logits[..., VOCAB:] == -torch.inf).all()


@both_archs
@pytest.mark.parametrize("position", [1, 11, CONTEXT - 1])
def test_a_token_changes_no_earlier_logits(position: int, arch: str) -> None:
    model, ids = random_model(arch=arch), random_ids()
    changed = ids.clone()
    changed[:, position] = (ids[:, position] + 1) % VOCAB
    with torch.no_grad():
        difference = (model(ids) - model(changed))[..., :VOCAB].abs().amax(dim=(0, 2))  # (T,)
    assert (difference[:position] < 1e-5).all()
    assert (difference[position:] > 1e-2).all()


@both_archs
def test_logits_of_a_prefix_are_the_first_logits_of_the_text(arch: str) -> None:
    model, ids = random_model(arch=arch), random_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[:, :7], model(ids[:, :7]), atol=1e-4, rtol=0)


def test_input_and_output_share_one_embedding() -> None:
    model, ids = random_model(), random_ids()
    assert sum(parameter.shape[0] == model.config.padded_vocab_size for parameter in model.parameters()) == 1
    unused = next(i for i in range(VOCAB) if i not in ids)
    with torch.no_grad():
        before = model(ids)
        model.tok_emb.weight[unused] *= 2  # not an input of these ids, but an output: its logit doubles
        after = model(ids)
    before[..., unused] *= 2
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(
    ("size", "published"),
    [("124M", 124_439_808), ("355M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_parameters_of_gpt2(size: str, published: int) -> None:
    """Compare with OpenAI's released weights; padding adds full rows of the embedding and nothing else."""
    with torch.device("meta"):
        padded = GPTModel(GPTConfig(50257, **PRESETS[size]))
        plain = GPTModel(GPTConfig(50257, **PRESETS[size], vocab_multiple=1))
    assert plain.n_parameters() == published
    assert padded.config.padded_vocab_size == 50304
    assert padded.n_parameters() == published + (50304 - 50257) * PRESETS[size]["emb_dim"]


def test_qkv_bias_adds_three_widths_per_block() -> None:
    with_bias, without = random_model(), random_model(qkv_bias=False)
    assert with_bias.n_parameters() - without.n_parameters() == 3 * 3 * 48


@pytest.mark.parametrize("size", PRESETS)
def test_presets_are_valid(size: str) -> None:
    assert GPTConfig(1000, **PRESETS[size]).padded_vocab_size == 1024


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"context_length": 0}, "context_length is 0"),
        ({"emb_dim": -48}, "emb_dim is -48"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"n_heads": 0}, "n_heads is 0"),
        ({"n_heads": 5}, "emb_dim 48 is not a multiple of n_heads 5"),
        ({"drop_rate": 1.0}, "drop_rate is 1.0"),
        ({"drop_rate": -0.1}, "drop_rate is -0.1"),
        ({"drop_rate": math.nan}, "drop_rate is nan"),
        ({"vocab_multiple": 0}, "vocab_multiple is 0"),
        ({"rope_base": 1.0}, "rope_base is 1.0"),
        ({"rope_base": 2**70}, "rope_base is 1180591620717411303424"),
        ({"rope_base": math.nan}, "rope_base is nan"),
    ],
    ids=str,
)
def test_impossible_dimensions_raise_an_error(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**changes)


@both_archs
def test_a_text_longer_than_the_context_raises_an_error(arch: str) -> None:
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        random_model(arch=arch)(random_ids(1, CONTEXT + 1))


@both_archs
def test_dropout_acts_in_training_only(arch: str) -> None:
    plain, dropping, ids = random_model(arch=arch), random_model(drop_rate=0.5, arch=arch), random_ids()
    with torch.no_grad():
        assert torch.equal(dropping(ids), plain(ids))
        dropping.train()
        assert not torch.allclose(dropping(ids), dropping(ids))
        plain.train()
        assert torch.equal(plain(ids), plain(ids))


@both_archs
def test_dropout_reaches_embeddings_attention_and_residuals(arch: str) -> None:
    model = random_model(drop_rate=0.5, arch=arch).train()
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.5] * (1 + 3)
    attention, x = CausalSelfAttention(model.config), torch.randn(2, CONTEXT, 48)
    rotary = rotary_tables(model.config) if arch == "modern" else None
    assert not torch.allclose(attention(x, rotary), attention(x, rotary))
    attention.eval()
    assert torch.equal(attention(x, rotary), attention(x, rotary))
    without = CausalSelfAttention(dataclasses.replace(model.config, drop_attention=False)).train()
    assert torch.equal(without(x, rotary), without(x, rotary))


@both_archs
def test_initial_weights(arch: str) -> None:
    torch.manual_seed(0)
    model = GPTModel(tiny_config(emb_dim=128, n_layers=8, arch=arch))
    deviations = {name: parameter.std().item() for name, parameter in model.named_parameters() if parameter.dim() == 2}
    special, other = {"out_proj.weight": 0.02 / 4}, 0.02  # 8 layers with two of them each: 0.02 / sqrt(16)
    if arch == "modern":  # blocks add nothing yet, and all logits are equal
        special, other = {"out_proj.weight": 0.0, "out_head.weight": 0.0, "tok_emb.weight": 1.0}, (2 * 128) ** -0.5
    for name, deviation in deviations.items():
        expected = next((value for ending, value in special.items() if name.endswith(ending)), other)
        assert deviation == pytest.approx(expected, rel=0.1), name
    ids = random_ids(8, CONTEXT + 1)
    loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(VOCAB), abs=0.1)  # all ids are about equally likely
