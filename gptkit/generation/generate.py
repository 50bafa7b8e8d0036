"""Text by a language model, one token after the other, with a cache; several texts at once.

`prefill` reads prompts, `decode_one_token` goes one token further, `sample` chooses: each a function of its arguments
(and of the cache, which the first two fill). `generate` is the loop over them, in ids, and `write` gives their text
as it comes.

Past the context's end: a text of n ids is read from `window_start(n)` on. So the window moves on by half a context at
a time, when it is full, and is read anew; in between a token costs one position's work.

A single text may be written with a draft's help (speculative decoding, Leviathan et al. 2023, arXiv 2211.17192): a
quicker model guesses a few ids, and the model reads them all at once, which costs it hardly more than one. What is
written is what the model itself draws, with the random numbers it would have drawn it with alone.

The model gives new_cache(B, S) and next_logits(ids, lengths, cache, n_slots), as gpt_model.py describes them, and with
a draft both of them further_logits(ids, cache, n_read).

Shapes: B batch (rows), T time, V vocabulary, S slots of the cache.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from gptkit.base.cli import first_line
from gptkit.generation.sampling import SamplingSettings, allowed_next_bytes, sample

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


N_DRAFT_TOKENS = 6  # of a draft, at a time: benchmarks/draft_sizes.py
REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet one
Decode = Callable[[Any, torch.Tensor, torch.Tensor, Any, int | None], torch.Tensor]
Choose = Callable[[torch.Tensor, Sequence[int], torch.Generator], int]  # logits (V,), the ids before -> the next id
Finish = Literal["length", "end_of_text", "stop"]


def window_start(n_ids: int, context_length: int) -> int:
    """From which id on a text of n_ids is read: from the first, or a multiple of half the context later."""
    hop = max(context_length // 2, 1)
    return hop * max(-(-(n_ids - context_length) // hop), 0)


def prefill(model: Any, rows: Sequence[Sequence[int]], cache: Any) -> torch.Tensor:
    """Read each row from its beginning into the cache; logits (B, V) of what follows each."""
    longest = max(map(len, rows))
    device = next(model.parameters()).device
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)  # (B, T)
    return model.next_logits(ids, torch.tensor([len(row) for row in rows], device=device), cache, longest)


def decode_one_token(
    model: Any, ids: torch.Tensor, lengths: torch.Tensor, cache: Any, n_slots: int | None
) -> torch.Tensor:  # (B, 1), (B,) -> (B, V)
    """Read the last id of each row into the cache; logits of what follows each. n_slots: the longest row's length."""
    return model.next_logits(ids, lengths, cache, n_slots)


def compiled_decode() -> Decode:
    """decode_one_token by torch.compile: shapes stay what they are, so all of the cache is looked at each time.

    Where that fails, it warns and goes on without.
    """
    step = torch.compile(
        lambda model, ids, lengths, cache: decode_one_token(model, ids, lengths, cache, None),
        mode="reduce-overhead",
        fullgraph=True,
    )

    works = True

    def decode(model: Any, ids: torch.Tensor, lengths: torch.Tensor, cache: Any, n_slots: int | None) -> torch.Tensor:
        nonlocal works
        if works:
            try:
                return step(model, ids, lengths, cache).clone()  # what it gives is overwritten by its next call
            except torch._dynamo.exc.TorchDynamoException as error:
                works = False
                print(f"warning: torch.compile failed ({first_line(error)}); going on without it", file=sys.stderr)
        return decode_one_token(model, ids, lengths, cache, n_slots)

    return decode


def shift_windows(
    model: Any, rows: Sequence[Sequence[int]], starts: list[int], cache: Any, context_length: int
) -> None:
    """Read a row whose window must move anew, up to its last id."""
    for i, row in enumerate(rows):
        start = window_start(len(row), context_length)
        if start > starts[i]:
            starts[i] = start
            if len(row) - start > 1:
                prefill(model, [row[start:-1]], cache.rows(slice(i, i + 1)))


def decode_rows(
    model: Any, rows: Sequence[Sequence[int]], starts: Sequence[int], cache: Any, decode: Decode
) -> torch.Tensor:
    """Logits (B, V) after the last id of each row."""
    device = next(model.parameters()).device
    lengths = [len(row) - start for row, start in zip(rows, starts, strict=True)]
    ids = torch.tensor([[row[-1]] for row in rows], device=device)
    return decode(model, ids, torch.tensor(lengths, device=device), cache, max(lengths))


def speculate(
    model: Any,
    draft: Any,
    row: Sequence[int],
    starts: Sequence[int],
    cache: Any,
    n_slots: int,
    choose: Choose,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """Logits (1, V) after the last id of the only row, again and again; the reader puts an id to the row in between.

    The draft's guesses are chosen with the random numbers that the reader's ids will be, so most of them are right. It
    reads from the cache what the model has put there, and writes to it what the model then overwrites.
    """
    while True:
        ids, n_read = [row[-1]], len(row) - 1 - starts[0]
        alike = generator.clone_state()
        for n_guessed in range(min(N_DRAFT_TOKENS, n_slots - n_read - 1)):
            logits = draft.extend(torch.tensor([ids[-1:]]), cache, n_read + n_guessed)
            ids.append(choose(logits[0], [*row, *ids[1:]], alike))
        for guess, logits in zip(ids, model.extend(torch.tensor([ids]), cache, n_read), strict=True):
            if guess != row[-1]:
                break
            yield logits[None]


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
    """The next id of each prompt's text, step by step, at most max_new_tokens times; None once a text has ended.

    A text ends at (and without) end-of-text, or where the reader adds its row to `stopped`. byte_ids are the ids of the
    bytes 0 … 255, where there are such: they are drawn in an order only that makes characters. Each row draws from its
    own generator, of the CPU: the same seed and prompt give the same text, alone or in a batch, on every device
    whose logits agree. (In bfloat16 and int8 they do not: a batch rounds otherwise.) A draft
    helps with a single text only, in place of `decode`; it and the model are on the CPU.
    """
    byte_of = {i: byte for byte, i in enumerate(byte_ids)}
    begins_nothing = {i for i, byte in byte_of.items() if 0x80 <= byte < 0xC2 or byte > 0xF4}
    banned = torch.tensor(sorted({*banned_ids, *begins_nothing}), dtype=torch.int64)
    rows = [list(prompt) for prompt in prompts]
    ended = set() if stopped is None else stopped

    def choose(logits: torch.Tensor, row: Sequence[int], generator: torch.Generator) -> int:
        if may_follow := [byte_ids[byte] for byte in allowed_next_bytes(row, byte_of)]:
            logits = torch.full_like(logits, -torch.inf).index_copy(0, torch.tensor(may_follow), logits[may_follow])
        elif len(banned):
            logits = logits.index_fill(0, banned, -torch.inf)
        return sample(logits, settings, row, generator)

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            starts = [window_start(len(row), context_length) for row in rows]
            windows = [row[start:] for row, start in zip(rows, starts, strict=True)]
            n_slots = min(max(map(len, windows)) + max_new_tokens, context_length)
            cache = model.new_cache(len(rows), n_slots)  # type: ignore[operator]
        ahead = None
        if draft is not None and len(rows) == 1:
            ahead = speculate(model, draft, rows[0], starts, cache, n_slots, choose, generators[0])
        for n_written in range(max_new_tokens):
            with torch.inference_mode():
                shift_windows(model, rows, starts, cache, context_length)
                if n_written == 0:
                    logits = prefill(model, windows, cache)
                elif ahead is not None:
                    logits = next(ahead)
                else:
                    logits = decode_rows(model, rows, starts, cache, decode)
                shown = logits.float().cpu()
                new: list[int | None] = [None] * len(rows)
                for i, row in enumerate(rows):
                    if i in ended:
                        continue
                    drawn = choose(shown[i], row, generators[i])
                    if drawn == end_of_text_id:
                        ended.add(i)
                    else:
                        new[i] = drawn
                        row.append(drawn)
            if len(ended) < len(rows):
                yield new
            if len(ended) == len(rows):
                return
    finally:
        model.train(was_training)


class TextStream:
    """A text that is being written: ids come in, whole characters come out, up to a stop string.

    A character may take several tokens (its bytes), and the beginning of a stop string may be nothing of the kind:
    such characters are held until it is known what they are.
    """

    def __init__(self, tokenizer: "Tokenizer", prompt: Sequence[int], seed: int, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.prompt, self.stop = tokenizer, list(prompt), [text for text in stop if text]
        self.generator = torch.Generator().manual_seed(seed)  # of the CPU
        self.n_new = 0  # tokens written
        self.finish: Finish | None = None  # why it has ended
        self._context, self._pending = self.prompt, []  # type: tuple[list[int], list[int]]
        self._held = ""

    def push(self, new: int) -> str:
        """What can be shown now that `new` has come."""
        self.n_new += 1
        self._pending.append(new)
        text = self.tokenizer.decode_continuation(self._context, self._pending)
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._pending = self._pending, []
        return self._release(text)

    def close(self, finish: "Finish") -> str:
        """What was still held, for the text ends here; bytes of a character that did not come whole are left out."""
        rest = self.tokenizer.decode_continuation(self._context, self._pending).rstrip(REPLACEMENT)
        rest = self._release(rest) + self._held
        self.finish = self.finish or finish
        self._pending, self._held = [], ""
        return rest

    def _release(self, text: str) -> str:
        self._held += text
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self.finish = "stop"
            shown, self._held = self._held[: min(found)], ""
            return shown
        n_sure = len(self._held) - max((_n_begun(self._held, stop) for stop in self.stop), default=0)
        shown, self._held = self._held[:n_sure], self._held[n_sure:]
        return shown


def _n_begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop`."""
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
    """Write the texts, all by one tokenizer, at once: (row, characters) as they come, the last ones when it ends."""
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
    for new in steps:
        for i, text in enumerate(texts):
            drawn = new[i]
            if text.finish:
                continue
            shown = text.close("end_of_text") if drawn is None else text.push(drawn)
            if text.finish:
                stopped.add(i)
            if shown or text.finish:
                yield i, shown
    for i, text in enumerate(texts):
        if not text.finish:
            yield i, text.close("end_of_text" if i in stopped else "length")
