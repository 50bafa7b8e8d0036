"""Check 100,000 draws of each sampler against the exact probabilities, by chi-squared.

    python benchmarks/checks/sampling.py

The exact probabilities are worked out here, in plain Python, from the definitions of temperature, top-k, top-p and
min-p; the draws are those of gptkit/generation/sampling.py.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import torch
from machine import log, versions, write_result

from gptkit.base.cli import run_command, setting
from gptkit.generation.sampling import SamplingSettings, sample

VOCAB_SIZE = 50
LEAST_P_VALUE = 1e-3  # a correct sampler fails this seldom, and with the fixed seed never
SAMPLERS: dict[str, dict[str, float]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1.5": {"temperature": 1.5},
    "top-k 7": {"temperature": 1.0, "top_k": 7},
    "top-p 0.8": {"temperature": 1.0, "top_p": 0.8},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "repetition penalty 1.5": {"temperature": 1.0, "repetition_penalty": 1.5},
    "all at once": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Check draws of each sampler against the exact probabilities."""

    n_draws: int = setting(100_000, "draws of each sampler", at_least=1)


def main(config: SamplingConfig) -> None:
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
    seen = list(range(0, VOCAB_SIZE, 3))
    found: dict[str, Any] = {}
    for number, (name, values) in enumerate(SAMPLERS.items()):
        settings = SamplingSettings(**values)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(number)
        counts = Counter(sample(logits, settings, seen, generator) for _ in range(config.n_draws))
        probabilities = exact(logits.double().tolist(), seen, settings)
        p = p_value(counts, probabilities, config.n_draws)
        found[name] = {"ids_that_can_be_drawn": len(probabilities), "p_value": round(p, 4)}
        log(f"{name}: {found[name]}")
    goals = {"each sampler's draws agree": all(each["p_value"] > LEAST_P_VALUE for each in found.values())}
    write_result(
        "sampling", {"n_draws": config.n_draws, "samplers": found, "versions": versions("torch"), "goals": goals}
    )


def softmax(logits: dict[int, float]) -> dict[int, float]:
    """Return the probabilities that the logits of some ids give."""
    largest = max(logits.values())
    weights = {i: math.exp(value - largest) for i, value in logits.items()}
    total = math.fsum(weights.values())
    return {i: weight / total for i, weight in weights.items()}


def exact(logits: list[float], seen: list[int], settings: SamplingSettings) -> dict[int, float]:
    """Return the probability of each id that can be drawn."""
    penalty = settings.repetition_penalty
    changed = {i: (x * penalty if x < 0 else x / penalty) if i in set(seen) else x for i, x in enumerate(logits)}
    left = {i: x / settings.temperature for i, x in changed.items()}
    best_first = sorted(left, key=lambda i: -left[i])
    if settings.top_k is not None:
        best_first = best_first[: settings.top_k]
    probabilities = softmax({i: left[i] for i in best_first})
    if settings.top_p is not None:
        total, n_kept = 0.0, 0
        for i in best_first:
            if total >= settings.top_p:
                break
            total, n_kept = total + probabilities[i], n_kept + 1
        best_first = best_first[:n_kept]
        probabilities = softmax({i: left[i] for i in best_first})
    if settings.min_p is not None:
        least = settings.min_p * max(probabilities.values())
        best_first = [i for i in best_first if probabilities[i] >= least]
    return softmax({i: left[i] for i in best_first})


def p_value(counts: Counter[int], probabilities: dict[int, float], n_draws: int) -> float:
    """Return how often chance alone gives counts that are further from the expected ones."""
    if not counts.keys() <= probabilities.keys():
        return 0.0
    expected = {i: p * n_draws for i, p in probabilities.items()}
    common = [i for i, n in expected.items() if n >= 5]  # the rest are counted as one
    pairs = [(counts[i], expected[i]) for i in common]
    rest = (n_draws - sum(n for n, _ in pairs), n_draws - math.fsum(n for _, n in pairs))
    pairs += [rest] if rest[1] > 1e-6 * n_draws else []
    distance = math.fsum((n - e) ** 2 / e for n, e in pairs)
    half = torch.tensor([(len(pairs) - 1) / 2, distance / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


if __name__ == "__main__":
    run_command(SamplingConfig, main)
