"""The GPT: token ids in, logits out. Imports torch only.

Two architectures. "gpt2" is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"):
learned positions, layer norm, GELU in its tanh form, tied embeddings. "modern" has exactly the form of transformers'
Qwen3ForCausalLM: RMS norm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, "RoFormer"), norms of queries and
keys (Henry et al. 2020), SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al. 2023), no biases, an output
head of its own (where nothing else is asked for). Both have pre-norm blocks. Names follow Raschka's "Build a Large Language Model From Scratch". Loss,
optimizer, sampling and files live elsewhere.

Shapes: B batch, T time (at most context_length), C channels (emb_dim), H heads, G heads of keys and values, D channels
of a head (C / H where nothing else is asked for), V vocabulary (padded), L layers, S slots of a cache.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

Arch = Literal["modern", "gpt2"]
ARCHS = get_args(Arch)
RMS_NORM_EPS = 1e-6  # as Qwen3's; layer norms have GPT-2's 1e-5, torch's default
# Far above any GPT, and low enough that a damaged or hostile configuration asks for nothing absurd.
MAX_DIMENSIONS = {
    "vocab_size": 1 << 24,
    "context_length": 1 << 20,
    "emb_dim": 1 << 16,
    "n_layers": 1 << 10,
    "n_heads": 1 << 12,
    "vocab_multiple": 1 << 12,
}
MAX_ROPE_BASE = 1e9
Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (T, D) or (B, T, D)


@dataclass(frozen=True)
class GPTConfig:
    """The dimensions of a GPT.

    Raises ValueError where a dimension is not positive, does not divide another as it must, or drop_rate is outside
    [0, 1).
    """

    vocab_size: int  # token ids the model may see and write
    context_length: int = 1024  # tokens
    emb_dim: int = 768
    n_layers: int = 12
    n_heads: int = 12
    drop_rate: float = 0.0
    qkv_bias: bool = True  # gpt2 only: a modern one has no biases
    vocab_multiple: int = 64  # the embedding has rows up to the next multiple: faster tensor-core products
    arch: Arch = "gpt2"
    n_kv_heads: int = 0  # modern only: heads of keys and values, each shared by a group of query heads (0: n_heads)
    rope_base: float = 10_000.0  # modern only: RoFormer, section 3.2.2
    head_width: int = 0  # modern only: channels of a head (0: emb_dim / n_heads)
    ff_width: int = 0  # modern only: channels within the feed-forward (0: 8/3 of emb_dim, up to a multiple of 32)
    tied_head: bool = False  # modern only: the embedding is the output head too, as it always is in gpt2

    def __post_init__(self) -> None:
        for name in (*MAX_DIMENSIONS, "n_kv_heads", "head_width", "ff_width"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a whole number")
        for name, most in MAX_DIMENSIONS.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and at most {most}")
        if self.emb_dim % self.n_heads and not self.head_width:
            raise ValueError(f"emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it must be at least 0 and below 1")
        for name in ("head_width", "ff_width"):
            if not 0 <= getattr(self, name) <= MAX_DIMENSIONS["emb_dim"]:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it must be at least 0 and at most {MAX_DIMENSIONS['emb_dim']}"
                )
        if self.arch == "modern" and self.head_dim % 2:
            raise ValueError(
                f"a head has {self.head_dim} channels (emb_dim / n_heads); with arch modern it must be even"
            )
        if self.arch not in ARCHS:
            raise ValueError(f"arch {self.arch} is unknown; there are {', '.join(ARCHS)}")
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
    def n_block_parameters(self) -> int:
        """The entries of the blocks' matrices."""
        attention = self.emb_dim * self.head_dim * (2 * self.n_heads + 2 * self.kv_heads)
        feed_forward = (2 if self.arch == "gpt2" else 3) * self.emb_dim * self.hidden_dim
        return self.n_layers * (attention + feed_forward)

    @property
    def hidden_dim(self) -> int:
        """The inner width of the feed-forward: four times emb_dim, or with three matrices in place of two 8/3 times."""
        if self.arch == "gpt2":
            return 4 * self.emb_dim
        return self.ff_width or math.ceil(self.emb_dim * 8 / 3 / 32) * 32

    @property
    def is_tied(self) -> bool:
        return self.tied_head or self.arch == "gpt2"


# GPT-2's four sizes, and five for less than a day of a GPU.
PRESETS: dict[str, dict[str, int]] = {
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
LADDER = ("nano", "micro", "tiny", "mini", "midi", "124M", "355M")  # what a budget chooses from


class RMSNorm(nn.RMSNorm):
    """torch's, in the type of its input also under autocast, where a float32 weight would keep it from fusing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def build_norm(config: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=RMS_NORM_EPS) if config.arch == "modern" else nn.LayerNorm(width)


def rotary_tables(config: GPTConfig) -> Rotation:
    """Cosines and sines of the angle of each position and channel, the two halves of a head alike: each (T, D)."""
    if torch.get_default_device().type == "meta":  # where only shapes are asked for, arithmetic is slow to start
        return torch.empty(config.context_length, config.head_dim), torch.empty(config.context_length, config.head_dim)
    frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rotary_emb(x: torch.Tensor, by: Rotation) -> torch.Tensor:  # (B, T, H, D) -> (B, T, H, D)
    """Turn channel i and channel i + D / 2 as a pair, by the angle of the position."""
    cos, sin = (table.unsqueeze(-2).to(x.dtype) for table in by)  # (T, 1, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@dataclass(frozen=True)
class KVCache:
    """The keys and values of what each row of a batch has read, so that a further token costs one position's work.

    Slot i of a row is position i of its text. Slots beyond a row's length hold what is to be overwritten.
    """

    keys: torch.Tensor  # (L, B, G, S, D); of a single layer (B, G, S, D)
    values: torch.Tensor

    def rows(self, which: slice) -> "KVCache":
        """Some rows: what is written there is written here."""
        return KVCache(self.keys[:, which], self.values[:, which])

    def layer(self, number: int) -> "KVCache":
        return KVCache(self.keys[number], self.values[number])


@dataclass(frozen=True)
class CacheView:
    """Where the ids of a call that uses a cache stand in its rows: alike in all, or (T = 1) in each elsewhere."""

    cache: KVCache
    positions: torch.Tensor  # (T,), or where T = 1 (B, 1)
    mask: torch.Tensor | None  # (…, T, n_slots): what each looks at. None: what stands before it, and itself
    n_slots: int  # the first so many are looked at; where positions are (T,), the last T of them are the ids' own

    def for_layer(self, number: int) -> "CacheView":
        return replace(self, cache=self.cache.layer(number))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what stands before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        modern = config.arch == "modern"
        self.widths = [heads * config.head_dim for heads in (config.n_heads, config.kv_heads, config.kv_heads)]
        self.qkv = nn.Linear(config.emb_dim, sum(self.widths), bias=config.qkv_bias and not modern)
        self.out_proj = nn.Linear(self.widths[0], config.emb_dim, bias=not modern)
        self.q_norm, self.k_norm = (build_norm(config, config.head_dim) if modern else nn.Identity() for _ in range(2))

    def forward(
        self, x: torch.Tensor, by: Rotation | None, reading: CacheView | None = None
    ) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, -1, self.config.head_dim) for t in self.qkv(x).split(self.widths, dim=-1))
        if by is not None:
            q, k = apply_rotary_emb(self.q_norm(q), by), apply_rotary_emb(self.k_norm(k), by)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        dropout = self.config.drop_rate if self.training else 0.0
        grouped = self.config.kv_heads < self.config.n_heads
        mask = None
        if reading is not None:
            k, v, mask = self.update_cache(k, v, reading)
        context = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=T > 1 and mask is None, enable_gqa=grouped
        )  # (B, H, T, D)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, -1))

    @staticmethod
    def update_cache(
        k: torch.Tensor, v: torch.Tensor, reading: CacheView
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Put keys and values, each (B, G, T, D), into the cache of a layer; those to attend to, and which of them."""
        keys, values, n_slots = reading.cache.keys, reading.cache.values, reading.n_slots
        if reading.positions.dim() == 1:
            own = slice(n_slots - k.shape[2], n_slots)
            keys[:, :, own], values[:, :, own] = k, v
        else:
            rows, slots = torch.arange(len(k), device=k.device), reading.positions[:, 0]
            keys[rows, :, slots], values[rows, :, slots] = k[:, :, 0], v[:, :, 0]
        return keys[:, :, :n_slots], values[:, :, :n_slots], reading.mask


class FeedForward(nn.Module):
    """Two layers with GELU between them, or (modern) SwiGLU: SiLU of one half times the other half."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.modern = config.arch == "modern"
        n_inner = 2 * config.hidden_dim if self.modern else config.hidden_dim
        self.up_proj = nn.Linear(config.emb_dim, n_inner, bias=not self.modern)  # modern: gate, then up
        self.out_proj = nn.Linear(config.hidden_dim, config.emb_dim, bias=not self.modern)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        x = self.up_proj(x)
        if self.modern:
            gate, up = x.chunk(2, dim=-1)
            return self.out_proj(F.silu(gate) * up)
        return self.out_proj(F.gelu(x, approximate="tanh"))


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a shortcut."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = build_norm(config, config.emb_dim)
        self.att = CausalSelfAttention(config)
        self.norm2 = build_norm(config, config.emb_dim)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(
        self, x: torch.Tensor, by: Rotation | None, reading: CacheView | None = None
    ) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.att(self.norm1(x), by, reading))
        return x + self.dropout(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """ids (B, T) int64 -> logits (B, T, padded_vocab_size); ids that only pad the vocabulary get -inf."""

    padding_bias: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.padded_vocab_size, config.emb_dim)  # tied: also the output head
        if config.arch == "gpt2":
            self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        else:
            if not config.is_tied:
                self.out_head = nn.Linear(config.emb_dim, config.padded_vocab_size, bias=False)
            for name, table in zip(("cos", "sin"), rotary_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = build_norm(config, config.emb_dim)
        self.inference_head: nn.Module | None = (
            None  # in place of the last product where it is only to write, not to train
        )
        # A bias of the last product, not a mask after it: padding costs no second pass over the logits.
        padding_bias = torch.zeros(config.padded_vocab_size)
        padding_bias[config.vocab_size :] = -torch.inf
        self.register_buffer("padding_bias", padding_bias, persistent=False)
        self.apply(self._initialize_gpt2 if config.arch == "gpt2" else self._initialize_modern)
        for name, parameter in self.named_parameters():  # two a block add to the stream
            if name.endswith("out_proj.weight"):
                if config.arch == "gpt2":
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layers))  # GPT-2, section 2.3
                else:
                    nn.init.zeros_(parameter)

    @classmethod
    def from_dimensions(cls, dimensions: Mapping[str, Any]) -> "GPTModel":
        """Build a model of GPTConfig's fields by name. Raises TypeError and ValueError where they are none."""
        return cls(GPTConfig(**dimensions))

    @staticmethod
    def _initialize_gpt2(module: nn.Module) -> None:
        """Normal with standard deviation 0.02, as in OpenAI's GPT-2 code; biases zero."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _initialize_modern(self, module: nn.Module) -> None:
        """As modded-nanogpt (Jordan et al. 2024): a block begins as the identity, the head with all words alike."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5 if self.config.is_tied else 1.0)
        elif not self.config.is_tied and module is self.out_head:
            nn.init.zeros_(self.out_head.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 * module.in_features) ** -0.5)

    @property
    def head_weight(self) -> torch.Tensor:
        """The matrix of the last product: (V, C)."""
        return self.tok_emb.weight if self.config.is_tied else self.out_head.weight

    def hidden_states(self, ids: torch.Tensor, reading: CacheView | None = None) -> torch.Tensor:  # (B, T) -> (B, T, C)
        """What the last product turns into logits."""
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context_length}")
        positions = torch.arange(T, device=ids.device) if reading is None else reading.positions
        x = self.tok_emb(ids)  # (B, T, C)
        by: Rotation | None = None
        if self.config.arch == "gpt2":
            x = x + self.pos_emb(positions)
        else:
            by = (self.cos[:T], self.sin[:T]) if reading is None else (self.cos[positions], self.sin[positions])
        x = self.drop_emb(x)
        for number, block in enumerate(self.trf_blocks):
            x = block(x, by, reading.for_layer(number) if reading else None)
        return self.final_norm(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:  # (…, C) -> (…, V)
        bias = self.padding_bias if self.config.vocab_size < self.config.padded_vocab_size else None
        return F.linear(x, self.head_weight, bias) if self.inference_head is None else self.inference_head(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, V)
        return self.logits(self.hidden_states(ids))

    def new_cache(self, batch_size: int, n_slots: int) -> KVCache:
        """An empty cache, of the weights' type and on their device."""
        weight = self.tok_emb.weight
        shape = (self.config.n_layers, batch_size, self.config.kv_heads, n_slots, self.config.head_dim)
        keys, values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))
        return KVCache(keys, values)

    def next_logits(
        self, ids: torch.Tensor, lengths: torch.Tensor, cache: KVCache, n_slots: int | None
    ) -> torch.Tensor:  # (B, T), (B,) -> (B, V)
        """Logits of the id that follows each row, which then has `lengths` ids, by means of what the cache holds.

        With T > 1 a row is read from its beginning, its ids to the left, and what stands beyond its length is not
        looked at; with T = 1 its last id is read. Then only the first n_slots of the cache are looked at: as many as
        the longest row has ids, or (for shapes that never change) None, all of them.
        """
        B, T = ids.shape
        if T > 1:
            reading = CacheView(cache, torch.arange(T, device=ids.device), None, T)
        elif B == 1 and n_slots:
            return self.extend(ids, cache, n_slots - 1)
        else:
            n_looked_at = n_slots or cache.keys.shape[3]
            is_filled = torch.arange(n_looked_at, device=ids.device) < lengths[:, None]  # (B, n_slots)
            reading = CacheView(cache, lengths[:, None] - 1, is_filled[:, None, None], n_looked_at)
        x = self.hidden_states(ids, reading)  # (B, T, C)
        last = x[torch.arange(B, device=ids.device), lengths - 1] if T > 1 else x[:, 0]  # (B, C)
        return self.logits(last)

    def extend(self, ids: torch.Tensor, cache: KVCache, n_read: int) -> torch.Tensor:  # (1, T) -> (T, V)
        """Logits of the id that follows each of some ids, which come after the first n_read of a cache's only row."""
        T, n_slots = ids.shape[1], n_read + ids.shape[1]
        positions = torch.arange(n_read, n_slots, device=ids.device)
        mask = torch.arange(n_slots, device=ids.device) <= positions[:, None] if T > 1 else None  # (T, n_slots)
        return self.logits(self.hidden_states(ids, CacheView(cache, positions, mask, n_slots)))[0]

    def n_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
