"""Models with random weights, one of each form that can be exported."""

from typing import Any

import torch

from gpt_model import GPTConfig, GPTModel

CONTEXT = 48
KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"arch": "gpt2", "n_heads": 4},
    "gpt2 without biases": {"arch": "gpt2", "n_heads": 2, "qkv_bias": False},
    "modern": {"arch": "modern", "n_heads": 4, "n_kv_heads": 2, "rope_base": 5000.0},
    "modern tied": {"arch": "modern", "n_heads": 3, "head_width": 20, "ff_width": 72, "tied_head": True},
}


def random_model(vocab_size: int, **kind: Any) -> GPTModel:
    """Return a model of one of KINDS whose weights, norms and biases too, are random."""
    torch.manual_seed(0)
    model = GPTModel(GPTConfig(vocab_size, context_length=CONTEXT, emb_dim=48, n_layers=2, **kind)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.2
    return model
