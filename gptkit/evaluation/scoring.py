"""Measure how well a model predicts text: the loss during training, and bits per character of documents.

Bits per character: for each document alone, ids = [end_of_text] + encode(document) + [end_of_text], and every id after
the first is predicted from those before it in the same document. A document longer than the context is read in windows
of context_length that begin every `stride` ids (half a context by default). Each id is scored once, in the first window
that reaches it, where at least context_length - stride ids stand before it (the first window scores all of its ids).

    bits_per_char = (sum of -log2 p over all predicted ids + 12.5 bits for each unknown token) / characters

where characters is len(text) over all documents, newlines included. The 12.5 bits are added to the cost of predicting
"unknown": log2 of about 6,000 rare characters is needed to spell out which one it is. So models with different
tokenizers can be compared, lossy ones too. Loss and perplexity leave the 12.5 bits out, and can be compared only where
the tokenizer is the same. Reading the documents is left to documents.py.

Shapes: B batch, T time, V vocabulary (padded).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from gptkit.base.devices import autocast
from gptkit.distributed import process_group

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


UNKNOWN_BITS = 12.5


def mean_loss(
    model: nn.Module,
    loss_of_batch: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Return the mean loss in nats per token over batches of (inputs, targets), each (B, T), without dropout.

    Each token has the same weight. `loss_of_batch` returns the model's mean over one batch. Draws no random number and
    leaves training mode as it was. Several processes, which have the same batches, share them: each batch is computed
    by one of them.
    """
    was_training = model.training
    model.eval()
    nats, n_tokens = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad(), autocast(device, dtype):
        for first in range(0, len(batches), process_group.world_size()):
            number = first + process_group.rank()
            inputs, targets = batches[min(number, len(batches) - 1)]
            loss = loss_of_batch(inputs.to(device), targets.to(device))
            if number < len(batches):  # else computed only because a sharded model is gathered by all processes
                nats += loss.cpu().double() * targets.numel()
                n_tokens += targets.numel()
    model.train(was_training)
    nats, n_tokens = process_group.all_reduce_sum(torch.stack((nats, n_tokens)))
    return nats.item() / n_tokens.item()


@dataclass
class Score:
    """Counts and costs summed over documents."""

    documents: int = 0
    characters: int = 0
    tokens: int = 0  # predicted ids: those of the documents, and an end-of-text after each
    unknown_tokens: int = 0
    nats: float = 0.0  # sum of -ln p over the tokens

    @property
    def loss(self) -> float:
        """Return the mean loss in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # above, exp would overflow

    @property
    def bits_per_char(self) -> float:
        return (self.nats / math.log(2) + UNKNOWN_BITS * self.unknown_tokens) / self.characters


@dataclass(frozen=True)
class _Window:
    ids: torch.Tensor  # (T + 1,): each but the first is predicted
    n_scored: int  # only the last n_scored of them count


def score_documents(
    forward: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: "Tokenizer",
    documents: Iterable[str],
    context_length: int,
    *,
    stride: int | None = None,
    batch_size: int = 8,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int], object] = lambda n_tokens: None,
) -> Score:
    """Score a model, given as a function from ids (B, T) to logits (B, T, V), as defined at the top of this module.

    The model must be in evaluation mode; `device` is where it is (the CPU by default). Windows of equal length are
    batched, and the logits of one batch are in memory at a time. After each batch `progress` is called with the number
    of tokens scored in it.
    """
    if stride is None:
        stride = max(context_length // 2, 1)
    assert 1 <= stride <= context_length  # or ids between two windows would not be scored
    device = device or torch.device("cpu")
    score = Score()
    windows = _windows_of_documents(tokenizer, documents, context_length, stride, score)
    with torch.no_grad(), autocast(device, dtype):
        for batch in _batches_of_equal_length(windows, batch_size):
            score.nats += _nats(forward, batch, device)
            n_tokens = sum(window.n_scored for window in batch)
            score.tokens += n_tokens
            progress(n_tokens)
    return score


def _windows_of_documents(
    tokenizer: "Tokenizer", documents: Iterable[str], context_length: int, stride: int, score: Score
) -> Iterator[_Window]:
    """Yield the windows of each document, which is counted in `score` as it is read."""
    for document in documents:
        encoded = tokenizer.encode(document)
        score.documents += 1
        score.characters += len(document)
        score.unknown_tokens += 0 if tokenizer.unknown_id is None else encoded.count(tokenizer.unknown_id)
        ids = torch.tensor([tokenizer.end_of_text_id, *encoded, tokenizer.end_of_text_id])
        yield from _windows(ids, context_length, stride)


def _windows(ids: torch.Tensor, context_length: int, stride: int) -> Iterator[_Window]:
    """Yield the windows of one document's ids (n,), which together score each id but the first once."""
    n_done, n_all = 0, len(ids) - 1
    for start in range(0, n_all, stride):
        end = min(start + context_length, n_all)
        yield _Window(ids[start : end + 1].clone(), end - n_done)  # a view would keep the whole document in memory
        n_done = end
        if n_done == n_all:
            return


def _batches_of_equal_length(windows: Iterable[_Window], batch_size: int) -> Iterator[list[_Window]]:
    """Yield batches of batch_size windows of equal length, and at the end smaller ones with the rest."""
    waiting: dict[int, list[_Window]] = {}
    for window in windows:
        batch = waiting.setdefault(len(window.ids), [])
        batch.append(window)
        if len(batch) == batch_size:
            yield waiting.pop(len(window.ids))
    yield from waiting.values()


def _nats(forward: Callable[[torch.Tensor], torch.Tensor], batch: list[_Window], device: torch.device) -> float:
    """Return the sum of -ln p over the scored ids of a batch."""
    ids = torch.stack([window.ids for window in batch]).to(device)  # (B, T + 1)
    logits = forward(ids[:, :-1])  # (B, T, V)
    nats = [  # a row at a time: in float32 it may be twice as large
        F.cross_entropy(row[-window.n_scored :].float(), targets[-window.n_scored :], reduction="none")
        for row, targets, window in zip(logits, ids[:, 1:], batch, strict=True)
    ]
    return torch.cat(nats).cpu().double().sum().item()
