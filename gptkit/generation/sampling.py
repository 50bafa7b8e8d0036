from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gptkit.base.cli import setting


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How the next token is drawn. They apply in this order: repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float = setting(0.8, "0 takes the likeliest token; higher is bolder", at_least=0)
    top_k: int | None = setting(None, "draw from the k likeliest tokens only", at_least=1)
    top_p: float | None = setting(
        None, "draw from the likeliest tokens that together have this probability", more_than=0, at_most=1
    )
    min_p: float | None = setting(
        None, "draw from tokens at least so likely, in parts of the likeliest one", at_least=0, at_most=1
    )
    repetition_penalty: float = setting(
        1.0, "above 1: tokens that stand in the text already are less likely", more_than=0, at_most=100
    )


def apply_repetition_penalty(
    logits: torch.Tensor, seen: torch.Tensor, penalty: float
) -> torch.Tensor:  # (V,), (n,) -> (V,)
    """Logits of the ids seen, divided by the penalty where positive, else multiplied: Keskar et al. 2019 (CTRL), 4.1."""
    of_seen = logits[seen]
    return logits.scatter(0, seen, torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty))


def filter_logits(logits: torch.Tensor, settings: SamplingSettings) -> torch.Tensor:  # (V,) -> (V,) float64
    """Logits over the temperature, which must not be 0, with -inf for what is not drawn from.

    Top-k: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5. Top-p: Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration", section 3.1. Min-p: Nguyen et al. 2024, "Turning Up the Heat", section 3.
    """
    scaled = (logits - logits.max()).double() / settings.temperature  # the likeliest at 0: no temperature overflows
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
    """One id drawn by the settings after the ids seen; logits (V,) float32 on the CPU. Draws V random numbers, or none.

    By the Gumbel-max trick (Maddison et al. 2014, "A* Sampling", section 2): with the same random numbers, logits that
    differ little seldom give another id, so that a draft guesses well.
    """
    if settings.repetition_penalty != 1:
        logits = apply_repetition_penalty(logits, torch.tensor(seen), settings.repetition_penalty)
    if settings.temperature == 0:
        return int(logits.argmax())
    uniform, candidates = torch.rand(len(logits), dtype=torch.float64, generator=generator).clamp_min_(1e-300), None
    if settings.top_k is not None and settings.top_k < len(logits):  # then the rest of the work is over few
        candidates = (logits >= logits.topk(settings.top_k).values[-1]).nonzero()[:, 0]
        logits, uniform = logits[candidates], uniform[candidates]
    drawn = int((filter_logits(logits, settings) - (-uniform.log()).log()).argmax())
    return drawn if candidates is None else int(candidates[drawn])


def next_utf8_bytes(begun: bytes) -> range:
    """The bytes that may follow the first ones of a character in UTF-8, none if it is whole: Unicode 17, table 3-7."""
    if not begun or len(begun) == sum(begun[0] >= least for least in (0, 0xC2, 0xE0, 0xF0)):
        return range(0)
    narrower = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0), 0xF4: range(0x80, 0x90)}
    return narrower.get(begun[0], range(0x80, 0xC0)) if len(begun) == 1 else range(0x80, 0xC0)


def allowed_next_bytes(row: Sequence[int], byte_of: Mapping[int, int]) -> range:
    """The bytes one of which must follow a row that ends within a character, as ids of bytes leave it; else none."""
    begun: list[int] = []
    for i in reversed(row[-3:]):
        byte = byte_of.get(i, 0)
        if byte < 0x80:
            break
        begun.insert(0, byte)
        if byte >= 0xC0:
            return next_utf8_bytes(bytes(begun))
    return range(0)
