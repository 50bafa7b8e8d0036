"""Run a command of this project with a model that does not have the form of Qwen3, to see what its form would give.

    python benchmarks/forms.py "value embeddings" pretraining.py --data_dir dataset/001 …

ingredients.py trains and scores these models. No other command knows their form: each refuses their checkpoints, but for
those of "bounded logits", which it takes for a Qwen3. What the project trains stays one, however well they score. The
forms are nanochat's (Karpathy 2025, github.com/karpathy/nanochat, gpt.py), most of them from modded-nanogpt (Jordan et al.
2024); ours are written anew.
"""

import runpy
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from machine import ROOT
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_model import FeedForward, GPTConfig, GPTModel, TransformerBlock
from gptkit.training import loss

GATE_CHANNELS = 32  # of a position, from which a gate is computed
MAX_LOGIT = 15.0


def after_init(change: Callable[[Any], None]) -> None:
    """Let GPTModel change itself at the end of its construction."""
    original = GPTModel.__init__

    def init(self: GPTModel, config: GPTConfig) -> None:
        original(self, config)
        change(self)

    GPTModel.__init__ = init  # type: ignore[method-assign]


class ValuedProjection(nn.Linear):
    """The projection to queries, keys and values, with an embedding of the tokens added to the values, by head."""

    ids: Tensor  # (B, T), of the present call

    def __init__(self, config: GPTConfig, width: int) -> None:
        super().__init__(config.emb_dim, width, bias=False)
        nn.init.normal_(self.weight, std=(2 * config.emb_dim) ** -0.5)
        self.heads = config.kv_heads
        self.table = nn.Embedding(config.padded_vocab_size, config.kv_heads * config.head_dim)
        nn.init.normal_(self.table.weight, std=config.emb_dim**-0.5)
        self.gate = nn.Linear(min(GATE_CHANNELS, config.emb_dim), config.kv_heads, bias=False)
        nn.init.zeros_(self.gate.weight)  # so that the gate begins at 1

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, (H + 2 G) D)
        qkv = super().forward(x)
        values = self.table(self.ids).to(qkv.dtype).unflatten(-1, (self.heads, -1))  # (B, T, G, D)
        gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, G)
        added = (gate[..., None] * values).flatten(-2)
        return qkv + F.pad(added, (qkv.shape[-1] - added.shape[-1], 0))


def add_value_embeddings() -> None:
    """Give every second block, the last among them, an embedding of its own that is added to the values."""

    def change(model: Any) -> None:
        for block in model.trf_blocks[::-2]:
            block.att.qkv = ValuedProjection(model.config, block.att.qkv.out_features)

    after_init(change)
    original = GPTModel.hidden_states

    def hidden_states(self: GPTModel, ids: Tensor, cache_view: Any = None) -> Tensor:
        for block in cast(Any, self.trf_blocks):
            block.att.qkv.ids = ids
        return original(self, ids, cache_view)

    GPTModel.hidden_states = hidden_states  # type: ignore[method-assign]


def add_residual_scalars() -> None:
    """Put a weighted sum of its input (at first 1) and the embedding (at first 0.1) before each block."""

    def change(model: Any) -> None:
        first: dict[str, Tensor] = {}
        for i, block in enumerate(model.trf_blocks):
            block.scales, block.first, block.is_first = nn.Parameter(torch.tensor([1.0, 0.1])), first, i == 0

    after_init(change)
    original = TransformerBlock.forward

    def forward(self: Any, x: Tensor, rotary: Any, cache_view: Any = None) -> Tensor:
        if self.is_first:
            self.first["x"] = x
        return original(self, self.scales[0] * x + self.scales[1] * self.first["x"], rotary, cache_view)

    TransformerBlock.forward = forward  # type: ignore[method-assign]


def use_squared_relu() -> None:
    """Put two matrices with ReLU squared between them (So et al. 2021, Primer) in place of SwiGLU's three."""

    def change(model: Any) -> None:
        width = model.config.emb_dim
        for block in model.trf_blocks:
            block.ff.up_proj = nn.Linear(width, 4 * width, bias=False)
            block.ff.out_proj = nn.Linear(4 * width, width, bias=False)
            nn.init.normal_(block.ff.up_proj.weight, std=(2 * width) ** -0.5)
            nn.init.zeros_(block.ff.out_proj.weight)

    after_init(change)

    def forward(self: FeedForward, x: Tensor) -> Tensor:
        return self.out_proj(F.relu(self.up_proj(x)).square())

    FeedForward.forward = forward  # type: ignore[method-assign]


class Smear(nn.Module):
    """Add a gated share of the embedding before to each position's. A position alone, as in generation, stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(min(GATE_CHANNELS, width), 1, bias=False)
        nn.init.zeros_(self.gate.weight)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        gate = self.scale * torch.sigmoid(self.gate(x[:, 1:, : self.gate.in_features]))  # (B, T - 1, 1)
        return x + F.pad(gate * x[:, :-1], (0, 0, 1, 0))


def add_smear() -> None:
    """Let each position's embedding have a gated share of the one before."""

    def change(model: Any) -> None:
        model.drop_emb = nn.Sequential(Smear(model.config.emb_dim), model.drop_emb)

    after_init(change)


def bound_logits() -> None:
    """Bound the logits by MAX_LOGIT, by a tanh (Gemma 2)."""
    original = GPTModel.logits

    def bounded(logits: Tensor) -> Tensor:
        return MAX_LOGIT * torch.tanh(logits.float() / MAX_LOGIT)

    def logits(self: GPTModel, hidden_states: Tensor) -> Tensor:
        found = bounded(original(self, hidden_states))
        found[..., self.config.vocab_size :] = -torch.inf
        return found

    def bounded_cross_entropy(
        hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, teacher: None = None
    ) -> Tensor:
        return F.cross_entropy(bounded(F.linear(hidden, weight)[..., :vocab_size]).flatten(0, -2), targets.flatten())

    GPTModel.logits = logits  # type: ignore[method-assign]
    loss.linear_cross_entropy = bounded_cross_entropy  # type: ignore[assignment]


FORMS = {
    "value embeddings": add_value_embeddings,
    "scalars on residual and embedding": add_residual_scalars,
    "ReLU squared, not SwiGLU": use_squared_relu,
    "smeared embeddings": add_smear,
    "bounded logits": bound_logits,
}


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in FORMS:
        forms = ", ".join(map(repr, FORMS))
        print(f"error: give a form, a command and its flags; {sys.argv[1:2]} is none of {forms}", file=sys.stderr)
        sys.exit(2)
    form, command, *arguments = sys.argv[1:]
    FORMS[form]()  # before the command imports what is changed here
    sys.argv = [str(ROOT / command), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")
