"""The GPT model: token ids in, logits out. Imports torch and the standard library only.

There are two architectures. "gpt2" is GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners"): learned positions, layer norm, GELU in its tanh form, tied embeddings. "modern" has exactly the form of
transformers' Qwen3ForCausalLM: RMS norm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, "RoFormer"), norms
of queries and keys (Henry et al. 2020), SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al. 2023), no
biases, and an output head of its own unless tied_head is set. Both have pre-norm blocks. Names follow Raschka's "Build
a Large Language Model From Scratch". The loss, the optimizer, sampling and file formats live elsewhere.

Shape letters:
    B  batch          T  time, at most context_length    C  channels, emb_dim
    H  query heads    G  key and value heads             D  channels of a head, C / H unless head_width is set
    L  layers         V  vocabulary, padded              F  inner channels of the feed-forward, hidden_dim
    S  slots of a KV cache, one per position
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Arch = Literal["modern", "gpt2"]
ARCHS = get_args(Arch)
RMS_NORM_EPS = 1e-6  # as in Qwen3; layer norms have GPT-2's 1e-5, which is torch's default
# Smallest and largest values; the largest are far above any GPT's, but stop a damaged or hostile config.
DIMENSION_BOUNDS = {
    "vocab_size": (1, 1 << 24), "context_length": (1, 1 << 20), "emb_dim": (1, 1 << 16), "n_layers": (1, 1 << 10),
    "n_heads": (1, 1 << 12), "vocab_multiple": (1, 1 << 12), "head_width": (0, 1 << 16), "ff_width": (0, 1 << 16),
}  # fmt: skip
MAX_ROPE_BASE = 1e9
RotaryTables = tuple[Tensor, Tensor]  # cosines and sines, each (T, D) or (B, T, D)


@dataclass(frozen=True)
class GPTConfig:
    """The dimensions of a GPT. Raises ValueError where one is out of its bounds or does not fit the others."""

    vocab_size: int  # number of token ids
    context_length: int = 1024  # tokens
    emb_dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    drop_rate: float = 0.0
    qkv_bias: bool = True  # gpt2 only: modern has no biases
    vocab_multiple: int = 64  # the embedding has rows up to the next multiple: faster tensor-core products
    arch: Arch = "gpt2"
    n_kv_heads: int = 0  # modern only: key and value heads, each shared by a group of query heads (0: n_heads)
    rope_base: float = 10_000.0  # modern only: RoFormer, section 3.2.2
    head_width: int = 0  # modern only: channels of a head (0: emb_dim / n_heads)
    ff_width: int = 0  # modern only: inner channels of the feed-forward (0: 8/3 of emb_dim, up to a multiple of 32)
    tied_head: bool = False  # modern only: the embedding is also the output head, as it always is in gpt2
    drop_attention: bool = True  # whether dropout also leaves out attention weights

    def __post_init__(self) -> None:
        for name in (*DIMENSION_BOUNDS, "n_kv_heads"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        for name, (least, most) in DIMENSION_BOUNDS.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least} and at most {most}")
        if self.emb_dim % self.n_heads and not self.head_width:
            raise ValueError(f"emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it must be at least 0 and below 1")
        if self.arch not in ARCHS:
            raise ValueError(f"arch {self.arch} is unknown; there are {', '.join(ARCHS)}")
        if self.arch == "modern" and (D := self.head_dim) % 2:
            raise ValueError(f"a head has {D} channels (emb_dim / n_heads); with arch modern it must be even")
        if not 1 < self.rope_base <= MAX_ROPE_BASE:
            raise ValueError(f"rope_base is {self.rope_base}; it must be more than 1 and at most {MAX_ROPE_BASE:.0e}")
        if self.n_kv_heads < 0 or self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.arch == "gpt2" and self.kv_heads != self.n_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} needs arch modern; gpt2 has as many as n_heads")
        if self.arch == "gpt2" and (self.head_width or self.ff_width):
            raise ValueError("head_width and ff_width need arch modern; in gpt2 they follow from emb_dim and n_heads")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def head_dim(self) -> int:
        return self.head_width or self.emb_dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Return the inner channels of the feed-forward: 4 times emb_dim, or 8/3 times with three matrices, not two."""
        swiglu_dim = self.ff_width or math.ceil(self.emb_dim * 8 / 3 / 32) * 32
        return 4 * self.emb_dim if self.arch == "gpt2" else swiglu_dim

    @property
    def is_tied(self) -> bool:
        return self.tied_head or self.arch == "gpt2"


PRESETS: dict[str, dict[str, int]] = {  # GPT-2's four sizes, and five that train in less than a day of a GPU
    "nano": dict(context_length=128, emb_dim=96, n_layers=2, n_heads=2),
    "micro": dict(context_length=128, emb_dim=128, n_layers=3, n_heads=2),
    "tiny": dict(context_length=128, emb_dim=192, n_layers=3, n_heads=3),
    "mini": dict(context_length=256, emb_dim=256, n_layers=4, n_heads=4),
    "midi": dict(context_length=512, emb_dim=384, n_layers=6, n_heads=6),
    "124M": dict(context_length=1024, emb_dim=768, n_layers=12, n_heads=12),
    "355M": dict(context_length=1024, emb_dim=1024, n_layers=24, n_heads=16),
    "774M": dict(context_length=1024, emb_dim=1280, n_layers=36, n_heads=20),
    "1558M": dict(context_length=1024, emb_dim=1600, n_layers=48, n_heads=25),
}
BUDGET_PRESETS = ("nano", "micro", "tiny", "mini", "midi", "124M", "355M")  # a time budget takes one of these


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in its input's dtype also under autocast, where a float32 weight would keep it from being fused."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build_norm(config: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=RMS_NORM_EPS) if config.arch == "modern" else nn.LayerNorm(width)


def rotary_tables(config: GPTConfig) -> RotaryTables:
    """Return cosines and sines of the angle by position and channel, each (T, D), the same in both halves of a head."""
    if torch.get_default_device().type == "meta":  # where only shapes are asked for, arithmetic is slow to start
        return torch.empty(config.context_length, config.head_dim), torch.empty(config.context_length, config.head_dim)
    frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # (B, T, H, D) -> (B, T, H, D)
    """Rotate the pairs of channels i and i + D / 2 by the angle of their position."""
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in (cos, sin))  # ([B,] T, 1, D)
    first_half, second_half = x.chunk(2, dim=-1)  # (B, T, H, D / 2)
    return x * cos + torch.cat((-second_half, first_half), dim=-1) * sin


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens that each row of a batch has read, so that they are not computed again."""

    keys: Tensor  # (L, B, G, S, D), or of a single layer (B, G, S, D). Slot i is position i of its row's text;
    values: Tensor  # the same. What slots beyond a row's length hold is never attended to.

    def rows(self, rows: slice) -> "KVCache":
        """Return a view of some rows of the batch."""
        return KVCache(self.keys[:, rows], self.values[:, rows])


@dataclass(frozen=True)
class CacheView:
    """What one forward call reads of a cache, and where it stores the keys and values of its own tokens."""

    cache: KVCache
    positions: Tensor  # (T,), the same in all rows; or (B, 1), each row's own, where T = 1
    mask: Tensor | None  # (…, T, n_slots), true where a token attends; None: to itself and to all before it
    n_slots: int  # attention reads the first n_slots slots; positions (T,) are the last T of them

    def layer(self, index: int) -> "CacheView":
        return replace(self, cache=KVCache(self.cache.keys[index], self.cache.values[index]))

    def update_cache(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:  # (B, G, T, D) -> (B, G, n_slots, D)
        """Store a layer's new keys and values, and return all that attention reads."""
        keys, values = self.cache.keys, self.cache.values  # (B, G, S, D)
        if self.positions.dim() == 1:
            new_slots = slice(self.n_slots - k.shape[2], self.n_slots)
            keys[:, :, new_slots], values[:, :, new_slots] = k, v
        else:
            rows, slots = torch.arange(len(k), device=k.device), self.positions[:, 0]
            keys[rows, :, slots], values[rows, :, slots] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, : self.n_slots], values[:, :, : self.n_slots]


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position attends to itself and to those before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.attend = config, F.scaled_dot_product_attention  # training on a CPU has a faster one
        modern, self.drop_rate = config.arch == "modern", config.drop_rate if config.drop_attention else 0.0
        self.qkv_widths = [n_heads * config.head_dim for n_heads in (config.n_heads, config.kv_heads, config.kv_heads)]
        self.qkv = nn.Linear(config.emb_dim, sum(self.qkv_widths), bias=config.qkv_bias and not modern)
        self.out_proj = nn.Linear(self.qkv_widths[0], config.emb_dim, bias=not modern)
        self.q_norm, self.k_norm = (build_norm(config, config.head_dim) if modern else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, rotary: RotaryTables | None, cache_view: CacheView | None = None) -> Tensor:
        B, T, _ = x.shape  # (B, T, C)
        q, k, v = (t.view(B, T, -1, self.config.head_dim) for t in self.qkv(x).split(self.qkv_widths, dim=-1))
        if rotary is not None:
            q, k = apply_rotary_emb(self.q_norm(q), *rotary), apply_rotary_emb(self.k_norm(k), *rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        mask = None
        if cache_view is not None:
            (k, v), mask = cache_view.update_cache(k, v), cache_view.mask  # (B, G, n_slots, D)
        dropout, grouped = self.drop_rate if self.training else 0.0, self.config.kv_heads < self.config.n_heads
        causal = T > 1 and mask is None
        x = self.attend(q, k, v, mask, dropout, causal, enable_gqa=grouped)  # (B, H, T, D)
        return self.out_proj(x.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class FeedForward(nn.Module):
    """Two linear layers with GELU between them, or (modern) SwiGLU: the SiLU of one half times the other half."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.modern = config.arch == "modern"
        up_width = 2 * config.hidden_dim if self.modern else config.hidden_dim  # modern: gate, then up
        self.up_proj = nn.Linear(config.emb_dim, up_width, bias=not self.modern)
        self.out_proj = nn.Linear(config.hidden_dim, config.emb_dim, bias=not self.modern)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        if not self.modern:
            return self.out_proj(F.gelu(self.up_proj(x), approximate="tanh"))
        gate, up = self.up_proj(x).chunk(2, dim=-1)  # (B, T, F)
        return self.out_proj(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each after a norm and with a residual connection around it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = build_norm(config, config.emb_dim)
        self.att = CausalSelfAttention(config)
        self.norm2 = build_norm(config, config.emb_dim)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, rotary: RotaryTables | None, cache_view: CacheView | None = None) -> Tensor:
        x = x + self.dropout(self.att(self.norm1(x), rotary, cache_view))  # (B, T, C)
        return x + self.dropout(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """ids (B, T) int64 -> logits (B, T, V); the ids that only pad the vocabulary get -inf."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.padded_vocab_size, config.emb_dim)
        if config.arch == "gpt2":
            self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        else:
            if not config.is_tied:
                self.out_head = nn.Linear(config.emb_dim, config.padded_vocab_size, bias=False)
            self.cos, self.sin = (nn.Buffer(table, persistent=False) for table in rotary_tables(config))  # (T, D)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = build_norm(config, config.emb_dim)
        self.inference_head: nn.Module | None = None  # a faster output head for generation; it cannot be trained
        padding_bias = torch.zeros(config.padded_vocab_size)
        padding_bias[config.vocab_size :] = -torch.inf
        self.padding_bias = nn.Buffer(padding_bias, persistent=False)  # costs no second pass over the logits
        self._initialize_weights()

    @classmethod
    def from_dimensions(cls, dimensions: Mapping[str, Any]) -> "GPTModel":
        """Build a model from GPTConfig's fields by name. Raises TypeError and ValueError where they are invalid."""
        return cls(GPTConfig(**dimensions))

    def _initialize_weights(self) -> None:
        """Initialize as OpenAI's GPT-2, or (modern: blocks that do nothing yet) modded-nanogpt (Jordan et al. 2024)."""
        gpt2, C, L = self.config.arch == "gpt2", self.config.emb_dim, self.config.n_layers
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02 if gpt2 else C**-0.5 if self.config.is_tied else 1.0)
            elif name == "out_head":
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02 if gpt2 else (2 * module.in_features) ** -0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("out_proj.weight") and gpt2:  # two per block add to the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * L))  # GPT-2, section 2.3
            elif name.endswith("out_proj.weight"):
                nn.init.zeros_(parameter)

    @property
    def head_weight(self) -> Tensor:  # (V, C)
        return self.tok_emb.weight if self.config.is_tied else self.out_head.weight

    def hidden_states(self, ids: Tensor, cache_view: CacheView | None = None) -> Tensor:  # (B, T) -> (B, T, C)
        """Return what the output head turns into logits. Raises ValueError where T is more than context_length."""
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context_length}")
        positions = torch.arange(T, device=ids.device) if cache_view is None else cache_view.positions
        x, rotary = self.tok_emb(ids), None  # (B, T, C)
        if self.config.arch == "gpt2":
            x = x + self.pos_emb(positions)
        else:
            rows = slice(T) if cache_view is None else positions
            rotary = self.cos[rows], self.sin[rows]  # (T, D) or (B, T, D)
        x = self.drop_emb(x)
        for i, block in enumerate(self.trf_blocks):
            x = block(x, rotary, cache_view.layer(i) if cache_view else None)
        return self.final_norm(x)

    def logits(self, hidden_states: Tensor) -> Tensor:  # (…, C) -> (…, V)
        if self.inference_head is not None:
            return self.inference_head(hidden_states)
        bias = self.padding_bias if self.config.vocab_size < self.config.padded_vocab_size else None
        return F.linear(hidden_states, self.head_weight, bias)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, V)
        return self.logits(self.hidden_states(ids))

    def new_cache(self, batch_size: int, n_slots: int) -> KVCache:
        """Return an empty cache in the weights' type and on their device."""
        config, weight = self.config, self.tok_emb.weight
        shape = (config.n_layers, batch_size, config.kv_heads, n_slots, config.head_dim)  # (L, B, G, S, D)
        keys, values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KVCache(keys, values)

    def next_logits(self, ids: Tensor, lengths: Tensor, cache: KVCache, n_slots: int | None) -> Tensor:
        """Read ids (B, T) into the cache; return logits (B, V) of each row's next id. `lengths` (B,) includes the ids.

        With T > 1 the rows are read from their beginning, padded on the right. With T = 1 each row's last id is read,
        and attention reads the cache's first n_slots slots: as many as the longest row has ids, or, for shapes that
        never change, None: all of them.
        """
        B, T = ids.shape
        if T > 1:
            x = self.hidden_states(ids, CacheView(cache, torch.arange(T, device=ids.device), None, T))  # (B, T, C)
            return self.logits(x[torch.arange(B, device=ids.device), lengths - 1])
        if B == 1 and n_slots:
            return self.extend(ids, cache, n_slots - 1)
        n_slots = n_slots or cache.keys.shape[3]
        is_filled = torch.arange(n_slots, device=ids.device) < lengths[:, None]  # (B, n_slots)
        cache_view = CacheView(cache, lengths[:, None] - 1, is_filled[:, None, None], n_slots)
        return self.logits(self.hidden_states(ids, cache_view)[:, 0])

    def extend(self, ids: Tensor, cache: KVCache, n_cached: int) -> Tensor:  # (1, T) -> (T, V)
        """Read ids after the first n_cached of the cache's only row; return the logits of the id after each of them."""
        T, n_slots = ids.shape[1], n_cached + ids.shape[1]
        positions = torch.arange(n_cached, n_slots, device=ids.device)
        mask = torch.arange(n_slots, device=ids.device) <= positions[:, None] if T > 1 else None  # (T, n_slots)
        return self.logits(self.hidden_states(ids, CacheView(cache, positions, mask, n_slots)))[0]

    def n_parameters(self) -> int:  # a tied embedding counts once
        return sum(parameter.numel() for parameter in self.parameters())
