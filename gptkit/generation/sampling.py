"""Choose the next token from logits: temperature, top-k, top-p, min-p, repetition penalty, and complete UTF-8 characters.

Computing the logits is left to generate.py. Shapes: V vocabulary, N some ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from gptkit.base.cli import setting


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is drawn. The settings apply in this order: repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float = setting(
        0.8, "0 takes the likeliest token; higher values are bolder", at_least=0, group="sampling"
    )
    top_k: int | None = setting(None, "draw from the k likeliest tokens only", at_least=1, group="sampling")
    top_p: float | None = setting(
        None,
        "draw from the likeliest tokens that together have this probability",
        more_than=0,
        at_most=1,
        group="sampling",
    )
    min_p: float | None = setting(
        None,
        "draw from the tokens that have at least this share of the likeliest token's probability",
        at_least=0,
        at_most=1,
        group="sampling",
    )
    repetition_penalty: float = setting(
        1.0,
        "above 1, tokens that the text already contains are less likely",
        more_than=0,
        at_most=100,
        group="sampling",
    )


def apply_repetition_penalty(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide the positive logits (V,) of the ids seen (N,) by the penalty and multiply the negative ones by it.

    Keskar et al. 2019, "CTRL", section 4.1.
    """
    seen_logits = logits[seen]  # (N,)
    return logits.scatter(0, seen, torch.where(seen_logits < 0, seen_logits * penalty, seen_logits / penalty))


def filter_logits(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:  # (V,) -> (V,) float64
    """Divide logits by the temperature, which must not be 0, and set those that are not drawn from to -inf.

    Top-k: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5. Top-p: Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration", section 3.1. Min-p: Nguyen et al. 2024, "Turning Up the Heat", section 3.
    """
    scaled = (logits - logits.max()).double() / settings.temperature  # the likeliest is 0, so that nothing overflows
    if settings.top_k is not None and settings.top_k < len(scaled):
        scaled = scaled.masked_fill(scaled < scaled.topk(settings.top_k).values[-1], -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ascending, order = scaled.sort()
        is_out = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        is_out[-1] = False  # the likeliest stays
        scaled = scaled.masked_fill(is_out.scatter(0, order, is_out), -torch.inf)
    if settings.min_p:
        probabilities = scaled.softmax(-1)
        scaled = scaled.masked_fill(probabilities < settings.min_p * probabilities.max(), -torch.inf)
    return scaled


def sample(logits: torch.Tensor, settings: SamplingSettings, seen: Sequence[int], generator: torch.Generator) -> int:
    """Draw the id that follows the ids seen, from logits (V,) float32 on the CPU. Takes V random numbers, or none.

    By the Gumbel-max trick (Maddison et al. 2014, "A* Sampling", section 2): with the same random numbers, logits that
    differ little seldom give another id, so that a draft model guesses well.
    """
    if settings.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, torch.tensor(seen), settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    uniform, candidates = torch.rand(len(logits), dtype=torch.float64, generator=generator).clamp_min_(1e-300), None
    if settings.top_k is not None and settings.top_k < len(logits):  # leaves few logits for what follows
        candidates = (logits >= logits.topk(settings.top_k).values[-1]).nonzero()[:, 0]
        logits, uniform = logits[candidates], uniform[candidates]
    drawn = int((filter_logits(logits, settings) - (-uniform.log()).log()).argmax())
    return drawn if candidates is None else int(candidates[drawn])


def next_utf8_bytes(begun: bytes) -> range:
    """Return the bytes that may follow the first bytes of a UTF-8 character, if more must: Unicode 17, table 3-7."""
    if not begun or len(begun) == sum(begun[0] >= least for least in (0, 0xC2, 0xE0, 0xF0)):
        return range(0)
    narrower = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0), 0xF4: range(0x80, 0x90)}
    return narrower.get(begun[0], range(0x80, 0xC0)) if len(begun) == 1 else range(0x80, 0xC0)


def allowed_next_bytes(ids: Sequence[int], byte_of: Mapping[int, int]) -> range:
    """Return the bytes that may follow ids that end within a character; none where they do not end within one.

    byte_of maps the ids that stand for single bytes to these bytes.
    """
    begun: list[int] = []
    for i in reversed(ids[-3:]):
        byte = byte_of.get(i, 0)
        if byte < 0x80:
            break
        begun.insert(0, byte)
        if byte >= 0xC0:
            return next_utf8_bytes(bytes(begun))
    return range(0)


class TokenSampler:
    """Draws the next id by the settings: never a banned one, and bytes only in an order that makes UTF-8 characters.

    byte_ids are the ids of the bytes 0 to 255, or empty where the vocabulary has none.
    """

    def __init__(self, settings: SamplingSettings, banned_ids: Iterable[int], byte_ids: Sequence[int]) -> None:
        self.settings, self.byte_ids = settings, byte_ids
        self.byte_of = {i: byte for byte, i in enumerate(byte_ids)}
        begins_no_character = {i for i, byte in self.byte_of.items() if 0x80 <= byte < 0xC2 or byte > 0xF4}
        self.banned = torch.tensor(sorted({*banned_ids, *begins_no_character}), dtype=torch.int64)

    def draw(self, logits: torch.Tensor, seen: Sequence[int], generator: torch.Generator) -> int:
        """Draw the id that follows the ids seen, from logits (V,) float32 on the CPU."""
        if allowed := [self.byte_ids[byte] for byte in allowed_next_bytes(seen, self.byte_of)]:
            logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(allowed), logits[allowed])
        elif len(self.banned):
            logits = logits.index_fill(0, self.banned, -torch.inf)
        return sample(logits, self.settings, seen, generator)
