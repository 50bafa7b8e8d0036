"""Generate text with a language model, token by token, with a KV cache; several texts at once.

`prefill` reads prompts, `decode_one_token` reads one more id of each row: functions of their arguments and of the
cache, which both fill. `decode_steps` and `speculate` yield the logits of step after step, `generate` draws ids from
them (sampling.py says how), and `stream_text` turns the ids into characters as they come.

Past the end of the context, a text of n ids is read from id `window_start(n)` on: whenever the window is full, it moves
by half a context and is read again. In between, only the new token is computed.

A single text may be generated with the help of a draft model (speculative decoding, Leviathan et al. 2023, arXiv
2211.17192): the faster draft guesses a few ids, and the model reads them all at once, which costs it hardly more than
reading one. The text is the one that the model draws itself, with the random numbers it would have used alone.

The model provides new_cache(B, S) and next_logits(ids, lengths, cache, n_slots) as in gpt_model.py; with a draft, both
models provide extend(ids, cache, n_cached) too.

Shapes: B batch (rows), T time, V vocabulary, S slots of the cache.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gptkit.base.cli import UserError, first_line
from gptkit.generation.sampling import SamplingSettings, TokenSampler

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


N_DRAFT_TOKENS = 6  # that a draft guesses at a time: benchmarks/draft_sizes.py
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not a character, or not yet
Decode = Callable[[Any, torch.Tensor, torch.Tensor, Any, int | None], torch.Tensor]  # as decode_one_token
FinishReason = Literal["length", "end_of_text", "stop"]


@dataclass
class CachedRows:
    """Rows of ids, and a cache that holds each row's window but for its last id."""

    ids: list[list[int]]  # the prompts; the caller appends each id it draws
    starts: list[int]  # index of the first id in each row's window
    cache: Any
    n_slots: int  # of the cache
    context_length: int


def window_start(n_ids: int, context_length: int) -> int:
    """Return the index of the first of n_ids ids that the model reads: 0, or a multiple of half the context."""
    hop = max(context_length // 2, 1)
    return hop * max(-(-(n_ids - context_length) // hop), 0)


def start_rows(model: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int, context_length: int) -> CachedRows:
    """Return rows that begin with the prompts, and an empty cache that is large enough for max_new_tokens more ids."""
    starts = [window_start(len(prompt), context_length) for prompt in prompts]
    longest = max(len(prompt) - start for prompt, start in zip(prompts, starts, strict=True))
    n_slots = min(longest + max_new_tokens, context_length)
    cache = model.new_cache(len(prompts), n_slots)
    return CachedRows([list(prompt) for prompt in prompts], starts, cache, n_slots, context_length)


def prefill(model: Any, rows: Sequence[Sequence[int]], cache: Any) -> torch.Tensor:
    """Read each row from its beginning into the cache; return the logits (B, V) of the id after each."""
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)  # (B, T)
    return model.next_logits(ids, torch.tensor([len(row) for row in rows], device=device), cache, longest)


def decode_one_token(
    model: Any, ids: torch.Tensor, lengths: torch.Tensor, cache: Any, n_slots: int | None
) -> torch.Tensor:  # (B, 1), (B,) -> (B, V)
    """Read the last id of each row into the cache; return the logits of the id after each.

    n_slots is the length of the longest row; None lets attention read the full cache.
    """
    return model.next_logits(ids, lengths, cache, n_slots)


def compiled_decode() -> Decode:
    """Return decode_one_token by torch.compile, which reads the full cache each time so that shapes never change.

    Where compilation fails, it prints a warning and continues without it.
    """
    step = torch.compile(
        lambda model, ids, lengths, cache: decode_one_token(model, ids, lengths, cache, None),
        mode="reduce-overhead",
        fullgraph=True,
    )
    compiles = True

    def decode(model: Any, ids: torch.Tensor, lengths: torch.Tensor, cache: Any, n_slots: int | None) -> torch.Tensor:
        nonlocal compiles
        if compiles:
            try:
                return step(model, ids, lengths, cache).clone()  # the next call overwrites the result of this one
            except torch._dynamo.exc.TorchDynamoException as error:
                compiles = False
                print(f"warning: torch.compile failed ({first_line(error)}); continuing without it", file=sys.stderr)
        return decode_one_token(model, ids, lengths, cache, n_slots)

    return decode


def prefill_windows(model: Any, rows: CachedRows) -> torch.Tensor:
    """Read the window of each row; return the logits (B, V) of the id after each."""
    windows = [ids[start:] for ids, start in zip(rows.ids, rows.starts, strict=True)]
    return prefill(model, windows, rows.cache)


def shift_windows(model: Any, rows: CachedRows) -> None:
    """Move the windows that are full by half a context, and read these rows again up to their last id."""
    for i, ids in enumerate(rows.ids):
        start = window_start(len(ids), rows.context_length)
        if start > rows.starts[i]:
            rows.starts[i] = start
            if len(ids) - start > 1:
                prefill(model, [ids[start:-1]], rows.cache.rows(slice(i, i + 1)))


def decode_steps(model: Any, rows: CachedRows, decode: Decode) -> Iterator[torch.Tensor]:
    """Yield the logits (B, V) of the id after each row, without end; the caller appends ids to the rows in between."""
    yield prefill_windows(model, rows)
    device = next(model.parameters()).device
    while True:
        shift_windows(model, rows)
        lengths = [len(ids) - start for ids, start in zip(rows.ids, rows.starts, strict=True)]
        last_ids = torch.tensor([[ids[-1]] for ids in rows.ids], device=device)  # (B, 1)
        yield decode(model, last_ids, torch.tensor(lengths, device=device), rows.cache, max(lengths))


def speculate(
    model: Any, draft: Any, rows: CachedRows, sampler: TokenSampler, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield what decode_steps yields for a single row (1, V), by fewer calls of the model.

    The draft's guesses are drawn with the random numbers with which the caller will draw, so that most of them are
    right. The draft reads from the cache what the model stored; what the draft stores, the model overwrites.
    """
    yield prefill_windows(model, rows)
    (row,) = rows.ids
    while True:
        shift_windows(model, rows)
        n_cached = len(row) - 1 - rows.starts[0]
        n_guesses = min(N_DRAFT_TOKENS, rows.n_slots - n_cached - 1)
        ids = [row[-1], *guess_ids(draft, row, n_guesses, rows.cache, n_cached, sampler, generator.clone_state())]
        for i, logits in zip(ids, model.extend(torch.tensor([ids]), rows.cache, n_cached), strict=True):
            if i != row[-1]:
                break
            yield logits[None]


def guess_ids(
    draft: Any,
    row: Sequence[int],
    n_guesses: int,
    cache: Any,
    n_cached: int,
    sampler: TokenSampler,
    generator: torch.Generator,
) -> list[int]:
    """Return the ids with which the draft continues a row whose last id alone is not yet in the cache."""
    ids = list(row)
    for n in range(n_guesses):
        logits = draft.extend(torch.tensor([ids[-1:]]), cache, n_cached + n)  # (1, V)
        ids.append(sampler.draw(logits[0], ids, generator))
    return ids[len(row) :]


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    context_length: int,
    end_of_text_id: int,
    banned_ids: Iterable[int],
    byte_ids: Sequence[int] = (),
    generators: Sequence[torch.Generator],
    stopped: set[int] | None = None,
    decode: Decode = decode_one_token,
    draft: nn.Module | None = None,
) -> Iterator[list[int | None]]:
    """Yield the next id of each prompt's text, at most max_new_tokens times; None for a text that has ended.

    A text ends before end-of-text, or when the caller adds its row to `stopped`. byte_ids are the ids of the bytes 0 to
    255, where the vocabulary has them: they are drawn only in an order that makes characters. Each row draws from its
    own generator, which is on the CPU: the same seed and prompt give the same text, alone or in a batch, on all devices
    whose logits agree. (In bfloat16 and int8 they do not: a batch is rounded differently.) A draft is used, instead of
    `decode`, for a single prompt only; then it and the model are on the CPU. Raises UserError where float16 overflows.
    """
    sampler = TokenSampler(settings, banned_ids, byte_ids)
    ended = set() if stopped is None else stopped
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            rows = start_rows(model, prompts, max_new_tokens, context_length)
        if draft is not None and len(prompts) == 1:
            steps = speculate(model, draft, rows, sampler, generators[0])
        else:
            steps = decode_steps(model, rows, decode)
        for _ in range(max_new_tokens):
            with torch.inference_mode():  # not around the yield: the caller may train in between
                computed = next(steps)
                logits = computed.float().cpu()  # (B, V)
                if computed.dtype == torch.float16 and not logits[:, 0].isfinite().all():
                    raise UserError("the model's activations overflow float16; give --dtype float32")
                new_ids = append_next_ids(rows.ids, logits, sampler, generators, end_of_text_id, ended)
            if len(ended) < len(prompts):
                yield new_ids
            if len(ended) == len(prompts):
                return
    finally:
        model.train(was_training)


def append_next_ids(
    rows: Sequence[list[int]],
    logits: torch.Tensor,
    sampler: TokenSampler,
    generators: Sequence[torch.Generator],
    end_of_text_id: int,
    ended: set[int],
) -> list[int | None]:
    """Draw an id for each row that has not ended, and append it; return the new ids. End-of-text ends its row instead."""
    new_ids: list[int | None] = [None] * len(rows)
    for i, row in enumerate(rows):
        if i in ended:
            continue
        drawn = sampler.draw(logits[i], row, generators[i])
        if drawn == end_of_text_id:
            ended.add(i)
        else:
            new_ids[i] = drawn
            row.append(drawn)
    return new_ids


class TextStream:
    """A text that is being generated: ids come in, complete characters come out, up to a stop string.

    A character may take several tokens (its bytes), and what looks like the beginning of a stop string may turn out to
    be none: such characters are held back until that is known.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], seed: int, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.prompt, self.stop = tokenizer, list(prompt), [text for text in stop if text]
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU
        self.n_new = 0  # tokens generated
        self.finish_reason: FinishReason | None = None  # None while the text has not ended
        self._context, self._pending = self.prompt, []  # type: tuple[list[int], list[int]]
        self._held_back = ""

    def push(self, new_id: int) -> str:
        """Add an id; return the characters that are certain now."""
        self.n_new += 1
        self._pending.append(new_id)
        text = self.tokenizer.decode_continuation(self._context, self._pending)
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return self._release(text)

    def close(self, finish_reason: FinishReason) -> str:
        """End the text; return the characters still held back, without the bytes of an incomplete character."""
        rest = self.tokenizer.decode_continuation(self._context, self._pending).rstrip(REPLACEMENT)
        rest = self._release(rest) + self._held_back
        self.finish_reason = self.finish_reason or finish_reason
        self._pending, self._held_back = [], ""
        return rest

    def _release(self, text: str) -> str:
        self._held_back += text
        found = [at for at in map(self._held_back.find, self.stop) if at >= 0]
        if found:
            self.finish_reason = "stop"
            released, self._held_back = self._held_back[: min(found)], ""
            return released
        n_held = max((_n_possible_stop(self._held_back, stop) for stop in self.stop), default=0)
        n_released = len(self._held_back) - n_held
        released, self._held_back = self._held_back[:n_released], self._held_back[n_released:]
        return released


def _n_possible_stop(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(
    model: nn.Module,
    texts: Sequence[TextStream],
    settings: SamplingSettings,
    max_new_tokens: int,
    context_length: int,
    decode: Decode = decode_one_token,
    draft: nn.Module | None = None,
) -> Generator[tuple[int, str], None, None]:
    """Generate texts, all with one tokenizer, at once; yield (row, characters) as they come, and once as a text ends."""
    tokenizer = texts[0].tokenizer
    stopped: set[int] = set()
    steps = generate(
        model,
        [text.prompt for text in texts],
        settings,
        max_new_tokens=max_new_tokens,
        context_length=context_length,
        end_of_text_id=tokenizer.end_of_text_id,
        banned_ids=tokenizer.never_generated,
        byte_ids=tokenizer.byte_ids,
        generators=[text.generator for text in texts],
        stopped=stopped,
        decode=decode,
        draft=draft,
    )
    for new_ids in steps:
        for i, (text, new_id) in enumerate(zip(texts, new_ids, strict=True)):
            if text.finish_reason:
                continue
            piece = text.close("end_of_text") if new_id is None else text.push(new_id)
            if text.finish_reason:
                stopped.add(i)
            if piece or text.finish_reason:
                yield i, piece
    for i, text in enumerate(texts):
        if not text.finish_reason:
            yield i, text.close("end_of_text" if i in stopped else "length")
