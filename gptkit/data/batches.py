"""Batches of training and validation sequences from a token stream.

A batch is a pure function of (seed, step), and each process takes its slice of it: evaluation, sampling, resuming and
the number of processes never disturb the order. The stream is cut into windows of context_length tokens, and each
epoch takes them in a random order of its own. Where documents are shuffled, the windows of each epoch are cut from another
order of the documents. The targets of a window are its tokens shifted by one.

Shapes: B sequences per batch, T time (context_length).
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from gptkit.base.cli import UserError
from gptkit.data.document_order import DocumentOrder, document_ends, document_order, read_windows
from gptkit.data.token_shards import Tokens, TokenStream

MAX_SHUFFLED = 1 << 22  # windows: 32 MiB for the order of an epoch
N_ROUNDS = 6
REPLACEMENT = 2  # sets these random numbers apart from others of the same seed and epoch
Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and targets, each (B, T) int64
Shuffle = Literal["windows", "documents"]


@functools.lru_cache(maxsize=2)
def epoch_order(n_windows: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the windows 0 … n_windows - 1 in the random order of one epoch."""
    return np.random.default_rng([seed, epoch]).permutation(n_windows)


def windows_at(n_windows: int, seed: int, epoch: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.integer]:
    """Return the windows at some positions (0 … n_windows - 1) of an epoch's random order.

    Up to MAX_SHUFFLED windows the order is drawn and kept in memory; beyond, each position is computed alone.
    """
    if n_windows <= MAX_SHUFFLED:
        return epoch_order(n_windows, seed, epoch)[positions]
    keys = np.random.default_rng([seed, epoch]).integers(1 << 63, size=N_ROUNDS, dtype=np.uint64)
    return permute(positions, n_windows, keys)


def permute(
    positions: npt.NDArray[np.integer], n: int, keys: npt.NDArray[np.uint64]
) -> npt.NDArray[np.integer]:  # (B,) -> (B,)
    """Return the images of some of 0 … n - 1 under a permutation chosen by the keys, each computed by itself.

    The permutation is a Feistel network over an even number of bits, applied again while the result is n or more
    (Black & Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3 and 4). Its round function is the mixer
    of SplitMix64 (Steele et al. 2014).
    """
    half = np.uint64(max((n - 1).bit_length() + 1, 2) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    found = positions.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        left, right = found[outside] >> half, found[outside] & mask
        for key in keys:
            mixed = right + key
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        found[outside] = left << half | right
        outside = found >= n
    return found


def n_windows(tokens: TokenStream, context_length: int) -> int:
    """Return how many windows the stream holds, with a target for each token."""
    return max(len(tokens) - 1, 0) // context_length


@dataclass(frozen=True)
class TrainingBatches:
    """The training batches of a run, by step. An epoch drops the windows that do not fill a last step."""

    tokens: TokenStream
    context_length: int  # tokens per sequence
    batch_size: int  # sequences per process per micro-step
    grad_accum_steps: int  # micro-steps per optimizer step
    seed: int
    n_processes: int = 1
    rank: int = 0  # of this process
    shuffle: Shuffle = "windows"  # what each epoch takes in a new order
    replace_rate: float = 0.0  # share of the input tokens that others replace, from 0 to below 1
    end_of_text_id: int = -1  # stands after each document; -1: no id does

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.grad_accum_steps * self.n_processes

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.context_length

    @property
    def steps_per_epoch(self) -> int:
        return n_windows(self.tokens, self.context_length) // self.sequences_per_step

    def epoch_of(self, step: int) -> int:
        """Return the epoch (from 1) that the last of the first `step` steps belongs to."""
        return (step - 1) // self.steps_per_epoch + 1

    def micro_batch(self, step: int, micro_step: int) -> Batch:
        """Return this process's batch of one micro-step (0 … grad_accum_steps - 1) of optimizer step `step` (from 0)."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        index = (step_in_epoch * self.grad_accum_steps + micro_step) * self.n_processes + self.rank
        first = index * self.batch_size
        positions = np.arange(first, first + self.batch_size)
        n_all = n_windows(self.tokens, self.context_length)
        windows = windows_at(n_all, self.seed, epoch, positions)
        if self.shuffle == "documents":
            rows = read_windows(self.tokens, self._document_order(epoch), windows, self.context_length)
        else:
            rows = _read_windows_of_text(self.tokens, windows.tolist(), self.context_length)
        inputs, targets = _inputs_and_targets(rows)
        if self.replace_rate:
            random = self.seed, epoch, first
            found = replace_tokens(inputs.numpy(), self.tokens, self.replace_rate, self.end_of_text_id, *random)
            inputs = torch.from_numpy(found)
        return inputs, targets

    @functools.cached_property
    def _document_order(self) -> Callable[[int], DocumentOrder]:
        """Return the order of the documents by epoch; the last two are kept in memory."""
        ends = document_ends(self.tokens, self.end_of_text_id)
        return functools.lru_cache(2)(functools.partial(document_order, ends, self.context_length, self.seed))

    def iterate_from(self, step: int, device: torch.device) -> Iterator[Batch]:
        """Yield the micro-batches on a device without end, beginning with the first one of `step`."""
        for number in itertools.count(step * self.grad_accum_steps):
            batch = self.micro_batch(*divmod(number, self.grad_accum_steps))
            inputs, targets = (ids.to(device, non_blocking=True) for ids in batch)
            yield inputs, targets


def check_data_size(batches: TrainingBatches, n_validation_tokens: int) -> None:
    """Raise UserError where the data does not fill one step, or the validation text is too short."""
    n_tokens, needed = len(batches.tokens), batches.tokens_per_step + 1
    if n_validation_tokens < 2:
        raise UserError(
            f"{n_validation_tokens} validation token(s) are too few to predict one; give more text or a larger --val_fraction"
        )
    if n_tokens < batches.context_length + 1:
        raise UserError(
            f"{n_tokens} training tokens are fewer than a context of {batches.context_length} and one more;"
            " give more text or a smaller --context_length"
        )
    if n_tokens < needed:
        raise UserError(
            f"a step of {batches.sequences_per_step} sequences x {batches.context_length} tokens needs {needed} training tokens"
            f" and there are {n_tokens}; give a smaller --batch_size, --grad_accum_steps or --context_length, or more text"
        )


def validation_batches(tokens: TokenStream, context_length: int, batch_size: int, n_batches: int) -> list[Batch]:
    """Return at most n_batches batches, always the same ones, spread evenly over the stream.

    A stream shorter than a window gives one shorter sequence.
    """
    context_length = min(context_length, len(tokens) - 1)
    n_all = n_windows(tokens, context_length)
    n_used = min(n_all, n_batches * batch_size)
    windows = [i * n_all // n_used for i in range(n_used)]
    return [
        _inputs_and_targets(_read_windows_of_text(tokens, windows[first : first + batch_size], context_length))
        for first in range(0, n_used, batch_size)
    ]


def replace_tokens(
    inputs: npt.NDArray[np.int64],
    tokens: TokenStream,
    rate: float,
    end_of_text_id: int,
    seed: int,
    epoch: int,
    position: int,
) -> npt.NDArray[np.int64]:  # (B, T) -> (B, T)
    """Return the inputs with each token replaced, with probability `rate`, by the one at a random place of the stream.

    So the replacing tokens are as frequent as in the text. End-of-text is not replaced, and replaces nothing, since that
    would cut documents. The inputs are the windows at `position` of an epoch and after it. The random numbers are those
    of Philox (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), a counter with four numbers for each
    count: a window takes the same ones whatever was read before. Whether a number is below rate * 2**64 says whether its
    token is replaced; its remainder, then still as good as uniform, says by which.
    """
    n_rows, length = inputs.shape
    n_counts = -(-length // 4)  # of a window
    rng = np.random.Philox(np.random.SeedSequence([seed, epoch, REPLACEMENT])).advance(position * n_counts)
    numbers = rng.random_raw((n_rows, 4 * n_counts))[:, :length]
    is_replaced = (numbers < np.uint64(rate * 2**64)) & (inputs != end_of_text_id)
    drawn = tokens.read_at((numbers[is_replaced] % np.uint64(len(tokens))).astype(np.int64))
    found = inputs.copy()
    found[is_replaced] = np.where(drawn == end_of_text_id, found[is_replaced], drawn)
    return found


def _read_windows_of_text(tokens: TokenStream, windows: Sequence[int], context_length: int) -> Tokens:
    """Read windows of context_length tokens, and the token after each: (B, T + 1)."""
    return np.stack([tokens.read(window * context_length, context_length + 1) for window in windows])


def _inputs_and_targets(rows: Tokens) -> Batch:
    """Return the inputs and the targets of windows, and of the token after each: (B, T + 1) -> two of (B, T)."""
    ids = torch.from_numpy(rows)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
