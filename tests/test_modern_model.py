"""gpt_model.py, arch modern: against transformers' Qwen3, and rotary embedding and dimensions against known answers."""

import pytest
import torch
from test_gpt_model import CONTEXT, VOCAB, random_ids, random_model, tiny_config
from torch import nn
from torch.nn import functional as F

from gpt_model import PRESETS, GPTConfig, GPTModel, apply_rotary_emb, rotary_tables

QWEN3_NAMES = {
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
    "att.q_norm": "self_attn.q_norm",
    "att.k_norm": "self_attn.k_norm",
    "att.out_proj": "self_attn.o_proj",
    "ff.out_proj": "mlp.down_proj",
}


def as_qwen3(tensors: dict[str, torch.Tensor], config: GPTConfig) -> dict[str, torch.Tensor]:
    """Return weights, or gradients, under Qwen3's names: fused matrices are split, rows that pad the vocabulary left out."""
    theirs = {
        "model.embed_tokens.weight": tensors["tok_emb.weight"][: config.vocab_size],
        "model.norm.weight": tensors["final_norm.weight"],
        "lm_head.weight": tensors["out_head.weight"][: config.vocab_size],
    }
    n_key_rows = config.kv_heads * config.head_dim
    for i in range(config.n_layers):
        block, layer = f"trf_blocks.{i}", f"model.layers.{i}"
        q, k, v = tensors[f"{block}.att.qkv.weight"].split([config.emb_dim, n_key_rows, n_key_rows])
        gate, up = tensors[f"{block}.ff.up_proj.weight"].chunk(2)
        theirs |= {f"{layer}.self_attn.{name}_proj.weight": rows for name, rows in (("q", q), ("k", k), ("v", v))}
        theirs |= {f"{layer}.mlp.{name}_proj.weight": rows for name, rows in (("gate", gate), ("up", up))}
        theirs |= {f"{layer}.{name}.weight": tensors[f"{block}.{ours}.weight"] for ours, name in QWEN3_NAMES.items()}
    return theirs


def qwen3_twin(model: GPTModel) -> nn.Module:
    """Return transformers' Qwen3ForCausalLM with the weights of `model`, without the rows that pad the vocabulary."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = model.config
    twin = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.context_length,
            hidden_size=config.emb_dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            hidden_act="silu",
            rms_norm_eps=1e-6,
            attention_bias=False,
            use_sliding_window=False,
            tie_word_embeddings=False,
            attn_implementation="eager",  # matrix products and a mask: not the kernel that ours calls
        )
    ).eval()
    twin.load_state_dict(as_qwen3(model.state_dict(), config))
    return twin


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_kv_heads": 2}, {"n_kv_heads": 1}, {"n_heads": 1}, {"vocab_multiple": 1}, {"rope_base": 500.0}],
    ids=str,
)
def test_logits_equal_transformers(changes: dict[str, float]) -> None:
    model = random_model(arch="modern", **changes)
    twin = qwen3_twin(model)
    for n_tokens in (1, 2, 7, CONTEXT):
        ids = random_ids(n_tokens=n_tokens)
        with torch.no_grad():
            ours, theirs = model(ids), twin(ids).logits
        assert ours.shape == (2, n_tokens, model.config.padded_vocab_size)
        assert theirs.std() > 1  # so that 1e-4 means something
        assert (ours[..., :VOCAB] - theirs).abs().max() < 1e-4


def test_logits_equal_transformers_where_activations_are_tiny() -> None:
    """With tiny activations the epsilon of a norm matters, which normal activations hide."""
    model = random_model(arch="modern")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and name != "out_head.weight":
                parameter *= 2e-3
        ids = random_ids()
        ours, theirs = model(ids)[..., :VOCAB], qwen3_twin(model)(ids).logits
    assert theirs.std() > 1e-1
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.parametrize("n_kv_heads", [0, 2])
def test_gradients_equal_transformers(n_kv_heads: int) -> None:
    model, ids = random_model(arch="modern", n_kv_heads=n_kv_heads), random_ids()
    twin = qwen3_twin(model)
    ours = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    theirs = twin(ids, labels=ids).loss
    ours.backward()
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    gradients = as_qwen3({name: parameter.grad for name, parameter in model.named_parameters()}, model.config)
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        largest = expected[name].abs().max().item()
        assert largest > 0, name
        torch.testing.assert_close(gradient, expected[name], atol=1e-4 * largest, rtol=0, msg=name)


def test_rotary_embedding_is_a_product_of_complex_numbers() -> None:
    """Compare with RoFormer, equation 12, with channels i and i + D / 2 as real and imaginary part."""
    config = tiny_config(arch="modern", rope_base=100.0)
    x = torch.randn(2, CONTEXT, 3, 12, generator=torch.Generator().manual_seed(0))
    angles = torch.arange(CONTEXT).double()[:, None] * 100.0 ** (-torch.arange(6).double() / 6)  # (T, D / 2)
    rotated = torch.complex(x[..., :6].double(), x[..., 6:].double()) * torch.exp(1j * angles)[:, None]
    expected = torch.cat((rotated.real, rotated.imag), dim=-1)
    torch.testing.assert_close(apply_rotary_emb(x, *rotary_tables(config)).double(), expected, atol=1e-5, rtol=0)


def test_products_of_queries_and_keys_depend_on_their_distance_alone() -> None:
    q, k = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(tiny_config(arch="modern"))
    queries, keys = (apply_rotary_emb(x.expand(1, CONTEXT, 1, 12), cos, sin)[0, :, 0] for x in (q, k))  # (T, D)
    products = queries @ keys.T  # (T, T): row, the query's position; column, the key's
    assert products[0, 0].item() == pytest.approx((q @ k).item(), abs=1e-5)
    assert products[0].unique().numel() == products[:, 0].unique().numel() == CONTEXT
    torch.testing.assert_close(products[1:, 1:], products[:-1, :-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("emb_dim", "hidden_dim"), [(12, 32), (48, 128), (128, 352), (256, 704), (768, 2048), (1024, 2752)]
)
def test_hidden_dim_is_eight_thirds_up_to_a_multiple_of_32(emb_dim: int, hidden_dim: int) -> None:
    assert tiny_config(arch="modern", emb_dim=emb_dim, n_heads=2).hidden_dim == hidden_dim


@pytest.mark.parametrize("n_kv_heads", [0, 2, 1])
def test_number_of_parameters_equals_transformers(n_kv_heads: int) -> None:
    model = random_model(arch="modern", n_kv_heads=n_kv_heads)
    n_padding = 2 * (model.config.padded_vocab_size - VOCAB) * 48  # rows of the embedding and of the head
    assert model.n_parameters() == sum(weight.numel() for weight in qwen3_twin(model).parameters()) + n_padding


@pytest.mark.parametrize("n_kv_heads", [0, 1])
@pytest.mark.parametrize("size", PRESETS)
def test_number_of_parameters_by_formula(size: str, n_kv_heads: int) -> None:
    with torch.device("meta"):
        model = GPTModel(GPTConfig(32_000, **PRESETS[size], arch="modern", n_kv_heads=n_kv_heads))
    C, L, H = (PRESETS[size][name] for name in ("emb_dim", "n_layers", "n_heads"))
    G, D, hidden = n_kv_heads or H, C // H, -(-8 * C // 96) * 32
    attention = C * (H + 2 * G) * D + H * D * C + 2 * D
    assert model.n_parameters() == 2 * 32_000 * C + L * (attention + 3 * C * hidden + 2 * C) + C
    if (size, n_kv_heads) == ("124M", 0):
        assert model.n_parameters() == 134_107_392


def test_state_dict_has_only_weights() -> None:
    model = random_model(arch="modern", qkv_bias=True)
    assert model.state_dict().keys() == {name for name, _ in model.named_parameters()}
    assert all(name.endswith(".weight") for name in model.state_dict())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"emb_dim": 20}, "a head has 5 channels"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"n_kv_heads": 8}, "n_heads 4 is not a multiple of n_kv_heads 8"),
        ({"n_kv_heads": -1}, "n_kv_heads -1"),
        ({"arch": "gpt2", "n_kv_heads": 2}, "n_kv_heads 2 needs arch modern"),
    ],
    ids=str,
)
def test_impossible_dimensions_raise_an_error(changes: dict[str, float | str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_config(**{"arch": "modern"} | changes)


def test_gpt2_may_have_an_odd_head_dim() -> None:
    assert tiny_config(emb_dim=20).head_dim == 5
