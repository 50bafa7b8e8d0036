"""The GPT: token ids in, logits out. Imports torch only.

Two architectures. "gpt2" is GPT-2's (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"):
learned positions, layer norm, GELU in its tanh form, tied embeddings. "modern" has exactly the form of transformers'
Qwen3ForCausalLM: RMS norm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, "RoFormer"), norms of queries and
keys (Henry et al. 2020), SwiGLU (Shazeer 2020), grouped-query attention (Ainslie et al. 2023), no biases, an output
head of its own. Both have pre-norm blocks. Names follow Raschka's "Build a Large Language Model From Scratch". Loss,
optimizer, sampling and files live elsewhere.

Shapes: B batch, T time (at most context_length), C channels (emb_dim), H heads, G heads of keys and values, D = C / H,
V vocabulary (padded).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional as F

Arch = Literal["modern", "gpt2"]
ARCHS = get_args(Arch)
RMS_NORM_EPS = 1e-6  # as Qwen3's; layer norms have GPT-2's 1e-5, torch's default
# Far above any GPT, and low enough that a damaged or hostile configuration asks for nothing absurd.
MOST = {
    "vocab_size": 1 << 24,
    "context_length": 1 << 20,
    "emb_dim": 1 << 16,
    "n_layers": 1 << 10,
    "n_heads": 1 << 12,
    "vocab_multiple": 1 << 12,
}
Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, each (T, D)


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

    def __post_init__(self) -> None:
        for name, most in MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1 and at most {most}")
        if self.emb_dim % self.n_heads:
            raise ValueError(f"emb_dim {self.emb_dim} is not a multiple of n_heads {self.n_heads}")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f"drop_rate is {self.drop_rate}; it must be at least 0 and below 1")
        if self.arch == "modern" and self.head_dim % 2:
            raise ValueError(f"emb_dim / n_heads is {self.head_dim}; with arch modern it must be even")
        if self.arch not in ARCHS:
            raise ValueError(f"arch {self.arch} is unknown; there are {', '.join(ARCHS)}")
        if self.rope_base <= 1:
            raise ValueError(f"rope_base is {self.rope_base}; it must be more than 1")
        if self.n_kv_heads < 0 or self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.arch == "gpt2" and self.kv_heads != self.n_heads:
            raise ValueError(f"n_kv_heads {self.n_kv_heads} needs arch modern; gpt2 has as many as n_heads")

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple

    @property
    def head_dim(self) -> int:
        return self.emb_dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def n_block_parameters(self) -> int:
        """The entries of the blocks' matrices."""
        attention = self.emb_dim * (2 * self.emb_dim + 2 * self.kv_heads * self.head_dim)
        feed_forward = (2 if self.arch == "gpt2" else 3) * self.emb_dim * self.hidden_dim
        return self.n_layers * (attention + feed_forward)

    @property
    def hidden_dim(self) -> int:
        """The inner width of the feed-forward: four times emb_dim, or with three matrices in place of two 8/3 times."""
        if self.arch == "gpt2":
            return 4 * self.emb_dim
        return math.ceil(self.emb_dim * 8 / 3 / 32) * 32


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


def norm_of(config: GPTConfig, width: int) -> nn.Module:
    return RMSNorm(width, eps=RMS_NORM_EPS) if config.arch == "modern" else nn.LayerNorm(width)


def rotation(config: GPTConfig) -> Rotation:
    """Cosines and sines of the angle of each position and channel, the two halves of a head alike: each (T, D)."""
    frequencies = config.rope_base ** (-torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angles = torch.outer(torch.arange(config.context_length, dtype=torch.float32), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, by: Rotation) -> torch.Tensor:  # (B, T, H, D) -> (B, T, H, D)
    """Turn channel i and channel i + D / 2 as a pair, by the angle of the position."""
    cos, sin = (table[:, None].to(x.dtype) for table in by)  # (T, 1, D)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what stands before it."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        modern = config.arch == "modern"
        self.widths = [heads * config.head_dim for heads in (config.n_heads, config.kv_heads, config.kv_heads)]
        self.qkv = nn.Linear(config.emb_dim, sum(self.widths), bias=config.qkv_bias and not modern)
        self.out_proj = nn.Linear(config.emb_dim, config.emb_dim, bias=not modern)
        self.q_norm, self.k_norm = (norm_of(config, config.head_dim) if modern else nn.Identity() for _ in range(2))

    def forward(self, x: torch.Tensor, by: Rotation | None) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        B, T, C = x.shape
        q, k, v = (t.view(B, T, -1, self.config.head_dim) for t in self.qkv(x).split(self.widths, dim=-1))
        if by is not None:
            q, k = rotate(self.q_norm(q), by), rotate(self.k_norm(k), by)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D), (B, G, T, D), (B, G, T, D)
        dropout = self.config.drop_rate if self.training else 0.0
        grouped = self.config.kv_heads < self.config.n_heads
        context = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        return self.out_proj(context.transpose(1, 2).reshape(B, T, C))


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
        self.norm1 = norm_of(config, config.emb_dim)
        self.att = CausalSelfAttention(config)
        self.norm2 = norm_of(config, config.emb_dim)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: torch.Tensor, by: Rotation | None) -> torch.Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.att(self.norm1(x), by))
        return x + self.dropout(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """ids (B, T) int64 -> logits (B, T, padded_vocab_size); ids that only pad the vocabulary get -inf."""

    padding_bias: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.padded_vocab_size, config.emb_dim)  # gpt2: also the output head
        if config.arch == "gpt2":
            self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        else:
            self.out_head = nn.Linear(config.emb_dim, config.padded_vocab_size, bias=False)
            for name, table in zip(("cos", "sin"), rotation(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = norm_of(config, config.emb_dim)
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
            nn.init.normal_(module.weight)
        elif module is self.out_head:
            nn.init.zeros_(self.out_head.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(2 * module.in_features) ** -0.5)

    @property
    def head_weight(self) -> torch.Tensor:
        """The matrix of the last product: (V, C)."""
        return self.tok_emb.weight if self.config.arch == "gpt2" else self.out_head.weight

    def features(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, C)
        """What the last product turns into logits."""
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit the context of {self.config.context_length}")
        x = self.tok_emb(ids)  # (B, T, C)
        by: Rotation | None = None
        if self.config.arch == "gpt2":
            x = x + self.pos_emb(torch.arange(T, device=ids.device))
        else:
            by = self.cos[:T], self.sin[:T]
        x = self.drop_emb(x)
        for block in self.trf_blocks:
            x = block(x, by)
        return self.final_norm(x)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # (B, T) -> (B, T, V)
        bias = self.padding_bias if self.config.vocab_size < self.config.padded_vocab_size else None
        return F.linear(self.features(ids), self.head_weight, bias)

    def n_parameters(self) -> int:
        """All parameters, a tied embedding counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def n_flops_per_token(self) -> int:
        """Floating-point operations of a training step, for each token: PaLM (Chowdhery et al. 2022), appendix B.

        The embedding, which is looked up, does not count; the head does, and attention as if it were not causal.
        """
        config = self.config
        n_matrix = config.n_block_parameters + config.padded_vocab_size * config.emb_dim
        return 6 * n_matrix + 12 * config.n_layers * config.emb_dim * config.context_length
