"""Attention for training on a CPU, against torch's own; where it is put, and when it is left out."""

import pytest
import torch
from random_models import random_model
from torch.nn import functional as F

from gptkit.training import cpu_layers
from gptkit.training.compilation import make_loss
from gptkit.training.cpu_layers import causal_attention, quicken
from gptkit.training.dropout import WordDropout

VOCAB = 50


def random_heads(n_heads: int, kv_heads: int, T: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return queries, keys and values of 2 sequences, as a model's are: transposed, not contiguous."""
    draw = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(2, T, heads, 6, generator=draw, dtype=torch.float64) for heads in (n_heads, kv_heads, kv_heads)
    ]
    return [tensor.to(dtype).transpose(1, 2).requires_grad_() for tensor in tensors]


def output_and_gradients(heads: list[torch.Tensor], attend: object) -> list[torch.Tensor]:
    output = attend(*heads)  # type: ignore[operator]
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum()
    return [output, *torch.autograd.grad(loss, heads)]


@pytest.mark.parametrize(("n_heads", "kv_heads"), [(3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("T", [1, 31, 32, 33, 100])  # blocks of 32 positions in float64
def test_output_and_gradients_are_those_of_torch(T: int, n_heads: int, kv_heads: int) -> None:
    heads = random_heads(n_heads, kv_heads, T)
    expected = output_and_gradients(
        heads, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    found = output_and_gradients(heads, lambda q, k, v: causal_attention(q, k, v, None, 0.0, True, enable_gqa=True))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02), (torch.float16, 0.003)]
)
def test_other_types_are_near_float64(dtype: torch.dtype, tolerance: float) -> None:
    heads = random_heads(4, 2, 200, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in heads]
    expected = output_and_gradients(
        exact, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    )
    found = output_and_gradients(heads, lambda q, k, v: causal_attention(q, k, v, None, 0.0, True, enable_gqa=True))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == dtype
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_what_it_does_not_do_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_heads(2, 2, 8)
    mask = torch.rand(8, 8) > 0.5
    mask.fill_diagonal_(True)
    torch.testing.assert_close(
        causal_attention(q, k, v, mask, 0.0, False), F.scaled_dot_product_attention(q, k, v, mask)
    )
    torch.testing.assert_close(causal_attention(q, k, v, None, 0.0, False), F.scaled_dot_product_attention(q, k, v))
    torch.manual_seed(1)
    dropped = causal_attention(q, k, v, None, 0.5, True)
    torch.manual_seed(1)
    assert torch.equal(dropped, F.scaled_dot_product_attention(q, k, v, None, 0.5, True))
    monkeypatch.setattr(cpu_layers._CausalAttention, "apply", None)
    large = causal_attention(q, k, v, None, 0.0, True, max_weight_bytes=2 * 2 * 8 * 8 * 8 - 1)
    assert torch.equal(large, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    with pytest.raises(TypeError):  # the stand-in is called
        causal_attention(q, k, v, None, 0.0, True, max_weight_bytes=2 * 2 * 8 * 8 * 8)


def test_the_layers_of_a_model_share_the_limit() -> None:
    model = quicken(random_model(VOCAB))
    assert len(model.trf_blocks) == 2
    for block in model.trf_blocks:
        assert block.att.attend.keywords == {"max_weight_bytes": cpu_layers.MAX_WEIGHT_BYTES // 2}


@pytest.mark.parametrize("kind", [{"arch": "gpt2"}, {"arch": "modern"}, {"arch": "modern", "n_kv_heads": 1}])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_it_is_the_same_model(kind: dict[str, object], compiled: bool) -> None:
    """Compiled it needs no C++ compiler here."""
    gradients = []
    for is_quick in (False, True):
        model = random_model(VOCAB, **kind).train()  # type: ignore[arg-type]
        if is_quick:
            assert quicken(model) is model
            assert all(block.att.attend.func is causal_attention for block in model.trf_blocks)
        hidden_states = torch.compile(model.hidden_states, backend="aot_eager") if compiled else model.hidden_states
        ids = torch.arange(2 * model.config.context_length).view(2, -1) % VOCAB
        loss = make_loss(model, hidden_states, VOCAB)(ids, ids)
        loss.backward()
        gradients.append({"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()})
    for name, theirs in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], theirs, rtol=1e-4, atol=1e-6, msg=name)


def test_a_run_of_version_0_1_keeps_its_dropout() -> None:
    for drops_attention, kind in ((True, torch.nn.Dropout), (False, WordDropout)):
        model = quicken(random_model(VOCAB, drop_rate=0.1, drop_attention=drops_attention))
        assert type(model.drop_emb) is kind
