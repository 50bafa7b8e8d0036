"""Text by a language model, one token after the other.

Shapes: T time, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn


def sample(logits: torch.Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """One id drawn from softmax(logits / temperature) over the top_k likeliest; logits (V,) float32 on the CPU.

    Temperature 0 takes the likeliest. Top-k: Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.
    """
    if temperature == 0:
        return int(logits.argmax())
    candidates = torch.arange(len(logits))
    if top_k is not None and top_k < len(logits):
        logits, candidates = logits.topk(top_k)
    scaled = (logits - logits.max()).double() / temperature  # the likeliest at 0: no temperature overflows
    return int(candidates[torch.multinomial(torch.softmax(scaled, dim=-1), 1, generator=generator)])


def generate(
    model: nn.Module,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    context_length: int,
    temperature: float,
    top_k: int | None,
    end_of_text_id: int,
    banned_ids: Iterable[int],
    generator: torch.Generator,
) -> Iterator[int]:
    """The ids that follow `ids`, at most max_new_tokens, up to (and without) end-of-text.

    The model maps (1, T) to logits (1, T, V) and sees the last context_length ids. `generator` is a CPU generator:
    the same seed gives the same text on every device whose logits agree.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    banned = torch.tensor(sorted(banned_ids), dtype=torch.int64)
    seen = list(ids)
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():
                window = torch.tensor([seen[-context_length:]], device=device)  # (1, T)
                logits = model(window)[0, -1].float().cpu()  # (V,)
            logits[banned] = -torch.inf
            new = sample(logits, temperature, top_k, generator)
            if new == end_of_text_id:
                return
            seen.append(new)
            yield new
    finally:
        model.train(was_training)
