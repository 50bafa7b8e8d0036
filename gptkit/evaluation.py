"""The loss of a model on text it is not trained on."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from gptkit.devices import autocast
from gptkit.losses import next_token_loss


def mean_loss(
    model: nn.Module,
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Nats a token over all batches of (inputs, targets), each (B, T), without dropout; each token counts the same.

    `forward` is the model or its compiled form. Draws no random number and leaves the model in training mode as it was.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    n_tokens = 0
    with torch.no_grad(), autocast(device, dtype):
        for inputs, targets in batches:
            loss = next_token_loss(forward(inputs.to(device)), targets.to(device))
            total += loss.cpu().double() * targets.numel()
            n_tokens += targets.numel()
    model.train(was_training)
    return total.item() / n_tokens
