"""The GPT: token ids in, logits out. Imports torch only.

GPT-2's architecture (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"):
learned positions, pre-norm blocks, GELU in its tanh form, tied embeddings. Names follow Raschka's
"Build a Large Language Model From Scratch". Loss, optimizer, sampling and files live elsewhere.

Shapes: B batch, T time (at most context_length), C channels (emb_dim), H heads, D = C / H, V vocabulary
(padded).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The dimensions of a GPT.

    Raises ValueError where a dimension is not positive, emb_dim is not a multiple of n_heads, or
    drop_rate is outside [0, 1).
    """

    vocab_size: int  # token ids the model may see and write
    context_length: int = 1024  # tokens
    emb_dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    drop_rate: float = 0.0
    qkv_bias: bool = True
    vocab_multiple: int = 64  # the embedding has rows up to the next multiple: faster tensor-core products

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_layers", "n_heads", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it must be at least 0 and below 1")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


# GPT-2's four sizes, and two for a laptop's CPU.
PRESETS: dict[str, dict[str, int]] = {
    "tiny": dict(context_length=128, emb_dim=128, n_layers=4, n_heads=4),
    "mini": dict(context_length=256, emb_dim=256, n_layers=4, n_heads=4),
    "124M": dict(context_length=1024, emb_dim=768, n_layers=12, n_heads=12),
    "355M": dict(context_length=1024, emb_dim=1024, n_layers=24, n_heads=16),
    "774M": dict(context_length=1024, emb_dim=1280, n_layers=36, n_heads=20),
    "1558M": dict(context_length=1024, emb_dim=1600, n_layers=48, n_heads=25),
}


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what stands before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.qkv = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = self.qkv(x).split(C, dim=-1)  # each (B, T, C)
        q, k, v = (t.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        dropout = self.drop_rate if self.training else 0.0
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)  # (B, H, T, D)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, C))


class FeedForward(nn.Module):
    """Two layers with GELU between them; the inner one is four times as wide."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.out_proj = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        return self.out_proj(F.gelu(self.up_proj(x), approximate="tanh"))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a layer norm and beside a shortcut."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.emb_dim)
        self.att = CausalSelfAttention(config)
        self.norm2 = nn.LayerNorm(config.emb_dim)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.att(self.norm1(x)))
        return x + self.dropout(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """ids (B, T) int64 -> logits (B, T, padded_vocab_size); ids that only pad the vocabulary get -inf."""

    padding_bias: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.padded_vocab_size, config.emb_dim)  # also the output head
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = nn.LayerNorm(config.emb_dim)
        # A bias of the last product, not a mask after it: padding costs no second pass over the logits.
        padding_bias = torch.zeros(config.padded_vocab_size)
        padding_bias[config.vocab_size :] = -torch.inf
        self.register_buffer("padding_bias", padding_bias, persistent=False)
        self.apply(self._initialize)
        for name, parameter in self.named_parameters():
            if name.endswith("out_proj.weight"):  # two a block add to the stream: GPT-2, section 2.3
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers))

    @staticmethod
    def _initialize(module: nn.Module) -> None:
        """Normal with standard deviation 0.02, as in OpenAI's GPT-2 code; biases zero."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, V)
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context_length}")
        positions = torch.arange(T, device=ids.device)
        x = self.drop_emb(self.tok_emb(ids) + self.pos_emb(positions))  # (B, T, C)
        for block in self.trf_blocks:
            x = block(x)
        bias = self.padding_bias if self.config.vocab_size < self.config.padded_vocab_size else None
        return F.linear(self.final_norm(x), self.tok_emb.weight, bias)

    def n_parameters(self) -> int:
        """All parameters, the tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
