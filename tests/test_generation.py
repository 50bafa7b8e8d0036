"""gptkit/generation: against generation without a cache, transformers' generate and logits processors, and chance."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import SAMPLE_TOKENIZER
from test_gpt_model import CONTEXT, VOCAB, both_archs, hugging_face_twin, random_model
from test_modern_model import qwen3_twin
from torch import nn

from gpt_model import GPTModel
from gptkit.generation.cpu_linear import PackedLinear, quantized_copy, replace_linear_layers
from gptkit.generation.generate import (
    N_DRAFT_TOKENS,
    TextStream,
    compiled_decode,
    decode_one_token,
    generate,
    prefill,
    stream_text,
    window_start,
)
from gptkit.generation.sampling import (
    SamplingSettings,
    apply_repetition_penalty,
    filter_logits,
    next_utf8_bytes,
    sample,
)
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece

END = 0
GREEDY = SamplingSettings(temperature=0.0)
PROMPTS = [[5, 60, 33], [7], list(range(20, 40)), [1, 2], [90] * 9, [3, 4, 5, 6], list(range(23)), [50, 51]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generated(
    model: nn.Module, prompts: Sequence[Sequence[int]], seed: int = 0, settings: SamplingSettings = GREEDY, **more: Any
) -> list[list[int]]:
    """Return the new ids of each prompt's text."""
    options = {"max_new_tokens": 20, "context_length": CONTEXT, "end_of_text_id": -1, "banned_ids": ()} | more
    generators = [generator(seed) for _ in prompts]
    texts: list[list[int]] = [[] for _ in prompts]
    for new_ids in generate(model, prompts, settings, generators=generators, **options):
        for text, i in zip(texts, new_ids, strict=True):
            text += [] if i is None else [i]
    return texts


def without_cache(model: GPTModel, prompt: list[int], n_new: int) -> list[int]:
    """Return greedily drawn ids, for each of which the model reads the full window anew."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_new):
            window = ids[window_start(len(ids), CONTEXT) :]
            ids.append(int(model(torch.tensor([window]))[0, -1].argmax()))
    return ids[len(prompt) :]


class Bigrams(nn.Module):
    """A model whose logits depend only on the last id; its cache holds the ids that were read."""

    class Cache:
        def __init__(self, read: list[list[int]]) -> None:
            self.read = read

        def rows(self, which: slice) -> "Bigrams.Cache":
            return Bigrams.Cache(self.read[which])

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)  # (V, V)
        self.windows: list[list[list[int]]] = []  # the ids that each row has read, call by call

    def new_cache(self, batch_size: int, n_slots: int) -> Cache:
        return self.Cache([[] for _ in range(batch_size)])

    def next_logits(self, ids: torch.Tensor, lengths: torch.Tensor, cache: Cache, n_slots: int) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        for row, length, read in zip(ids.tolist(), lengths.tolist(), cache.read, strict=True):
            read[:] = row[:length] if len(row) > 1 else [*read[: length - 1], *row]
            assert len(read) == length
        self.windows.append([list(read) for read in cache.read])
        return self.table[torch.tensor([read[-1] for read in cache.read])]


def counting(n: int = 10) -> Bigrams:
    """Return a model that continues i with i + 1 for certain, and the last id with 0."""
    return Bigrams(torch.eye(n).roll(1, dims=1) * 100)


def random_bigrams(n: int = 12, seed: int = 3) -> Bigrams:
    return Bigrams(torch.randn(n, n, generator=generator(seed)) * 2)


@functools.lru_cache
def texts_without_cache(**changes: Any) -> list[list[int]]:
    model = random_model(**changes, n_layers=2)
    return [without_cache(model, prompt, 3 * CONTEXT) for prompt in PROMPTS]


@pytest.mark.parametrize(
    "changes", [{"arch": "gpt2"}, {"arch": "modern"}, {"arch": "modern", "n_kv_heads": 2}], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_the_cache_does_not_change_the_text(changes: dict[str, Any], packed: bool) -> None:
    """Generate from single prompts and from eight of unequal length at once, far past the context's end."""
    model = random_model(**changes, n_layers=2)
    expected = texts_without_cache(**changes)
    assert len({tuple(text[-10:]) for text in expected}) > 4  # equal texts would show little
    if packed:
        replace_linear_layers(model, PackedLinear)
    assert generated(model, PROMPTS, max_new_tokens=3 * CONTEXT) == expected
    assert [generated(model, [prompt], max_new_tokens=3 * CONTEXT)[0] for prompt in PROMPTS] == expected


@both_archs
def test_cached_logits_equal_those_of_the_full_text(arch: str) -> None:
    model, ids = random_model(arch=arch), torch.randint(VOCAB, (3, CONTEXT), generator=generator(2))
    with torch.inference_mode():
        full = model(ids)  # (3, CONTEXT, V)
        cache = model.new_cache(3, CONTEXT)
        lengths = torch.tensor([4, 9, 1])
        rows = [row[:n] for row, n in zip(ids.tolist(), lengths.tolist(), strict=True)]
        found = [prefill(model, rows, cache)]
        while int(lengths.max()) < CONTEXT:
            new = ids[torch.arange(3), lengths][:, None]
            lengths = lengths + 1
            found.append(decode_one_token(model, new, lengths, cache, int(lengths.max())))
    for n, logits in enumerate(found):
        expected = torch.stack([full[row, start + n - 1] for row, start in enumerate((4, 9, 1))])
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_attention_may_read_the_full_cache() -> None:
    """A compiled step does so, because its shapes must not change."""
    model = random_model(arch="modern")
    with torch.inference_mode():
        logits = []
        for n_slots in (4, None):
            cache = model.new_cache(1, CONTEXT)
            cache.keys.fill_(7.0)  # slots beyond a row's length must not matter
            cache.values.fill_(7.0)
            prefill(model, [[5, 6, 7]], cache)
            logits.append(decode_one_token(model, torch.tensor([[8]]), torch.tensor([4]), cache, n_slots))
    torch.testing.assert_close(*logits)


@both_archs
@pytest.mark.parametrize("n_new", [1, 2, 5])
def test_extending_a_row_by_several_ids_at_once(arch: str, n_new: int) -> None:
    """What the cache holds after them, from wrong guesses, must not matter."""
    model, ids = random_model(arch=arch, n_kv_heads=2 if arch == "modern" else 0), list(range(5, 25))
    with torch.inference_mode():
        full = model(torch.tensor([ids]))[0]
        cache = model.new_cache(1, CONTEXT)
        cache.keys.fill_(7.0)
        cache.values.fill_(7.0)
        prefill(model, [ids[:4]], cache)
        for n_cached in range(4, 20, n_new):
            new_ids = torch.tensor([ids[n_cached : n_cached + n_new]])
            logits = model.extend(new_ids, cache, n_cached)
            torch.testing.assert_close(logits, full[n_cached : n_cached + n_new], atol=2e-4, rtol=1e-4)


class CountedModel(nn.Module):
    """A model that counts the calls of its extend."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model, self.n_calls = model, 0
        self.new_cache, self.next_logits = model.new_cache, model.next_logits

    def extend(self, *arguments: Any) -> torch.Tensor:
        self.n_calls += 1
        return self.model.extend(*arguments)


HOT = SamplingSettings(temperature=1.5)


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        HOT,
        SamplingSettings(temperature=0.7, top_k=9),
        SamplingSettings(temperature=2.0, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("changes", [{"arch": "gpt2"}, {"arch": "modern", "n_kv_heads": 2}], ids=str)
def test_a_draft_does_not_change_the_text(changes: dict[str, Any], settings: SamplingSettings) -> None:
    """Try a good draft and a random one, far past the context's end; the good one saves most of the model's calls."""
    model = random_model(**changes, n_layers=1)
    for number, prompt in enumerate([[7], list(range(20, 40)), list(range(23)), list(range(60))]):
        options: dict[str, Any] = {"seed": number, "settings": settings, "banned_ids": [3, 40], "max_new_tokens": 70}
        expected = generated(model, [prompt], **options)
        for draft, most in ((quantized_copy(model), 40), (random_model(seed=5, **changes, n_layers=1), 70)):
            counted = CountedModel(model)
            assert generated(counted, [prompt], draft=draft, **options) == expected
            assert 70 / (N_DRAFT_TOKENS + 1) < counted.n_calls < most
        end = expected[0][33]
        found = generated(model, [prompt], draft=quantized_copy(model), end_of_text_id=end, **options)
        assert found == [expected[0][: expected[0].index(end)]]


def test_a_draft_is_used_for_a_single_text_only() -> None:
    model = random_model()
    expected = generated(model, PROMPTS, 4, HOT)
    assert generated(model, PROMPTS, 4, HOT, draft=quantized_copy(model)) == expected


def test_a_draft_guesses_bytes_that_make_characters() -> None:
    model = CountedModel(random_model(arch="modern", vocab_size=300))
    options: dict[str, Any] = {"settings": HOT, "byte_ids": range(20, 276), "max_new_tokens": 60}
    expected = generated(model.model, [[7]], **options)
    assert sum(i - 20 >= 0x80 for i in expected[0] if i < 276) > 10
    assert generated(model, [[7]], draft=quantized_copy(model.model), **options) == expected
    assert model.n_calls < 25


@pytest.mark.parametrize("context_length", [1, 2, 3])
def test_a_draft_in_the_smallest_contexts(context_length: int) -> None:
    model = random_model(arch="modern", context_length=context_length)
    options: dict[str, Any] = {"settings": HOT, "context_length": context_length}
    expected = generated(model, [[7, 8]], **options)
    assert generated(model, [[7, 8]], draft=quantized_copy(model), **options) == expected
    options["max_new_tokens"] = 1
    assert generated(model, [[7, 8]], draft=quantized_copy(model), **options) == [expected[0][:1]]


@pytest.mark.slow
def test_compiled_decoding_generates_the_same() -> None:
    model = random_model(arch="modern", n_layers=1)
    expected = generated(model, [[5, 60], [7]], max_new_tokens=2 * CONTEXT)
    assert generated(model, [[5, 60], [7]], max_new_tokens=2 * CONTEXT, decode=compiled_decode()) == expected


@pytest.mark.parametrize(
    ("n_ids", "context_length", "start"),
    [(1, 8, 0), (8, 8, 0), (9, 8, 4), (12, 8, 4), (13, 8, 8), (100, 8, 92), (1, 1, 0), (2, 1, 1), (9, 1, 8), (8, 7, 3)],
)
def test_the_window_moves_by_half_a_context(n_ids: int, context_length: int, start: int) -> None:
    assert window_start(n_ids, context_length) == start
    assert 1 <= n_ids - start <= context_length


def test_the_ids_that_the_model_reads_as_the_window_moves() -> None:
    model = counting()
    assert generated(model, [[1, 2, 3]], context_length=4, max_new_tokens=5) == [[4, 5, 6, 7, 8]]
    assert model.windows == [[[1, 2, 3]], [[1, 2, 3, 4]], [[3, 4]], [[3, 4, 5]], [[3, 4, 5, 6]], [[5, 6]], [[5, 6, 7]]]
    model.windows.clear()
    assert generated(model, [[1, 2, 3, 4, 5, 6]], context_length=4, max_new_tokens=1) == [[7]]
    assert model.windows == [[[3, 4, 5, 6]]]  # the last ids of a prompt that is too long


@pytest.mark.parametrize("banned", [[], list(range(40))], ids=["all", "some banned"])
@both_archs
def test_equals_transformers(arch: str, banned: list[int]) -> None:
    model = random_model(arch=arch)
    twin = hugging_face_twin(model) if arch == "gpt2" else qwen3_twin(model)
    for batch in ([PROMPTS[0]], PROMPTS):
        longest = max(map(len, batch))
        padded = torch.tensor([[0] * (longest - len(row)) + list(row) for row in batch])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        n_new = min(CONTEXT - longest, 15) if len(batch) == 1 else CONTEXT - longest
        theirs = twin.generate(
            padded, attention_mask=mask, do_sample=False, max_new_tokens=n_new, suppress_tokens=banned or None,
            eos_token_id=VOCAB + 1, pad_token_id=0,
        )  # fmt: skip
        assert generated(model, batch, banned_ids=banned, max_new_tokens=n_new) == theirs[:, longest:].tolist()


SETTINGS = [
    SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty)
    for temperature, top_k, top_p, min_p, penalty in itertools.product(
        (0.3, 1.0, 1.7), (None, 1, 5, 500), (None, 0.2, 0.9, 1.0), (None, 0.0, 0.05, 1.0), (1.0, 1.3, 0.7)
    )
]


def test_samplers_equal_transformers_logits_processors() -> None:
    """Try every combination, each on logits of its own: the same ids are left, with the same probabilities."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as theirs

    for number, settings in enumerate(SETTINGS):
        logits = torch.randn(200, generator=generator(number)) * 3
        seen = torch.randint(200, (30,), generator=generator(number + 1))
        processors = LogitsProcessorList([theirs.TemperatureLogitsWarper(settings.temperature)])
        if settings.top_k is not None:
            processors.append(theirs.TopKLogitsWarper(settings.top_k))
        if settings.top_p is not None and settings.top_p < 1:
            processors.append(theirs.TopPLogitsWarper(settings.top_p))
        if settings.min_p is not None:
            processors.append(theirs.MinPLogitsWarper(settings.min_p))
        processors.insert(0, theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
        expected = processors(seen[None], logits.double()[None])[0]
        found = filter_logits(apply_repetition_penalty(logits.double(), seen, settings.repetition_penalty), settings)
        assert torch.equal(found.isfinite(), expected.isfinite()), settings
        torch.testing.assert_close(found.softmax(-1), expected.softmax(-1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_the_smallest_temperatures_are_nearly_zero(temperature: float) -> None:
    assert generated(random_model(), [[5]], settings=SamplingSettings(temperature=temperature)) == generated(
        random_model(), [[5]]
    )


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "min_p": 0.05}], ids=str
)
def test_draws_follow_the_probabilities(settings: dict[str, Any]) -> None:
    """Test with chi-squared: by chance, one run in 10,000 has counts that are so far from the expected ones."""
    sampling, logits, n_draws = (
        SamplingSettings(temperature=1.2, **settings),
        torch.randn(12, generator=generator(1)),
        5_000,
    )
    expected = n_draws * filter_logits(logits, sampling).softmax(-1)
    allowed = expected > 0
    draws = generator(2)
    counts = torch.bincount(torch.tensor([sample(logits, sampling, [], draws) for _ in range(n_draws)]), minlength=12)
    assert (counts[~allowed] == 0).all()
    assert expected[allowed].min() > 5  # chi-squared needs that
    distance = ((counts - expected)[allowed] ** 2 / expected[allowed]).sum()
    freedom = torch.tensor(int(allowed.sum()) - 1.0, dtype=torch.float64)
    assert torch.special.gammaincc(freedom / 2, distance / 2) > 1e-4


def test_a_repetition_penalty_makes_text_less_repetitive() -> None:
    """The prompt's tokens are penalized too, as in transformers."""
    model = Bigrams(torch.eye(10) * 2 + 1)  # i most likely follows i
    assert generated(model, [[3]]) == [[3] * 20]
    (text,) = generated(
        model, [[3]], settings=SamplingSettings(temperature=0.0, repetition_penalty=5.0), max_new_tokens=9
    )
    assert 3 not in text[:3]


def test_banned_ids_are_never_generated() -> None:
    model, banned = random_bigrams(), {0, 3, 7, 11}
    hot = SamplingSettings(temperature=3.0)
    assert (
        set(generated(model, [[1]], settings=hot, banned_ids=banned, max_new_tokens=500)[0]) == set(range(12)) - banned
    )
    assert generated(counting(), [[1]], banned_ids={2, *range(4, 10)}, max_new_tokens=1) == [[0]]


def test_bytes_that_may_follow() -> None:
    """Compare with Python's own decoder, after each beginning of one, two and three bytes of a character."""

    def may_follow(begun: bytes) -> list[int]:
        n_bytes = 1 + sum(begun[0] >= least for least in (0xC0, 0xE0, 0xF0))
        rest = b"\x80" * (n_bytes - len(begun) - 1)
        return (
            [byte for byte in range(256) if is_character(begun + bytes([byte]) + rest)] if len(begun) < n_bytes else []
        )

    def is_character(data: bytes) -> bool:
        try:
            return len(data.decode()) == 1
        except UnicodeDecodeError:
            return False

    assert list(next_utf8_bytes(b"")) == []
    for first in range(0xC2, 0xF5):
        assert list(next_utf8_bytes(bytes([first]))) == may_follow(bytes([first]))
        for second in may_follow(bytes([first]))[::5]:
            assert list(next_utf8_bytes(bytes([first, second]))) == may_follow(bytes([first, second]))
            for third in may_follow(bytes([first, second]))[::9]:
                begun = bytes([first, second, third])
                assert list(next_utf8_bytes(begun)) == may_follow(begun)
    assert list(next_utf8_bytes(b"a")) == list(next_utf8_bytes("🐈".encode())) == []


def test_a_random_model_generates_no_broken_character(tokenizer: Tokenizer) -> None:
    """Bytes and other tokens are drawn, far past the context's end, three texts at once."""
    table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
    table[:, list(tokenizer.byte_ids)] = 3
    texts = [TextStream(tokenizer, tokenizer.encode(prompt), 7) for prompt in ("雨", "🐈", "猫が")]
    continuations = ["", "", ""]
    for row, piece in stream_text(Bigrams(table), texts, SamplingSettings(temperature=1.0), 400, CONTEXT):
        continuations[row] += piece
    assert all("\ufffd" not in text and max(text) > "\uffff" for text in continuations)


def test_a_text_ends_at_end_of_text_without_yielding_it() -> None:
    found = generated(counting(), [[6], [9], [END, 6], [2]], end_of_text_id=END, max_new_tokens=4)
    assert found == [[7, 8, 9], [], [7, 8, 9], [3, 4, 5, 6]]  # end-of-text in the prompt ends nothing
    assert generated(counting(), [[9], [9]], end_of_text_id=END) == [[], []]


def test_a_row_that_the_caller_stops_ends_and_the_others_continue() -> None:
    stopped: set[int] = set()
    steps = generate(
        counting(), [[1], [4]], GREEDY, max_new_tokens=4, context_length=CONTEXT, end_of_text_id=-1, banned_ids=(),
        generators=[generator()] * 2, stopped=stopped,
    )  # fmt: skip
    assert next(steps) == [2, 5]
    stopped.add(0)
    assert next(steps) == [None, 6]
    stopped.add(1)
    assert list(steps) == []


@pytest.mark.parametrize("n", [0, 1, 25])
def test_generates_max_new_tokens(n: int) -> None:
    assert generated(counting(), [[6]], max_new_tokens=n) == [[(7 + i) % 10 for i in range(n)]]


def test_the_same_seed_and_prompt_generate_the_same_alone_and_in_a_batch() -> None:
    model, hot = random_model(arch="modern"), SamplingSettings(temperature=2.0)
    alone = [generated(model, [prompt], 4, hot, max_new_tokens=40)[0] for prompt in PROMPTS]
    assert generated(model, PROMPTS, 4, hot, max_new_tokens=40) == alone
    assert generated(model, PROMPTS[::-1], 4, hot, max_new_tokens=40) == alone[::-1]
    assert generated(model, PROMPTS, 5, hot, max_new_tokens=40) != alone


def test_draws_from_its_generators_only() -> None:
    before = torch.get_rng_state()
    generated(random_bigrams(), [[5]], settings=SamplingSettings())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_in_the_mode_it_was_in(training: bool) -> None:
    model = counting()
    model.train(training)
    generated(model, [[1]])
    assert model.training is training
    options = dict(max_new_tokens=9, context_length=9, end_of_text_id=-1, banned_ids=(), generators=[generator()])
    begun = generate(model, [[1]], GREEDY, **options)
    next(begun)
    assert torch.is_grad_enabled()  # the caller may train between two tokens
    begun.close()
    assert model.training is training
    with pytest.raises(IndexError):
        generated(model, [[99]])
    assert model.training is training


# Ids into text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


TEXT = "吾輩は𠮟られた。\n\n　「ABC、が」 🐈‍⬛ と\t鳴く。"  # some characters have no token and are encoded as bytes


def pieces_of(text: TextStream, ids: Sequence[int]) -> Iterator[str]:
    for i in ids:
        yield text.push(i)
        if text.finish_reason:
            return
    yield text.close("length")


def test_characters_come_complete_and_as_early_as_possible(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > len(TEXT)  # bytes are among them
    pieces = list(pieces_of(TextStream(tokenizer, tokenizer.encode("雨"), 0), ids))
    assert "".join(pieces) == TEXT
    assert "\ufffd" not in "".join(pieces)
    for n in range(1, len(ids)):
        so_far = tokenizer.decode_continuation(tokenizer.encode("雨"), ids[:n])
        assert "".join(pieces[:n]) == so_far.rstrip("\ufffd")


def test_bytes_that_are_not_a_character(tokenizer: Tokenizer) -> None:
    """Within a text they become replacement characters; at its end half a character is left out."""
    cat = tokenizer.encode("🐈")
    text = TextStream(tokenizer, [tokenizer.end_of_text_id], 0)
    assert [text.push(i) for i in cat[:-1]] == [""] * (len(cat) - 1)
    assert text.close("length") == ""
    text = TextStream(tokenizer, [tokenizer.end_of_text_id], 0)
    pieces = "".join(text.push(i) for i in [*cat[:-1], *tokenizer.encode("雨")])
    assert pieces.startswith("\ufffd")
    assert pieces.strip("\ufffd") == "雨"


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["。"], "吾輩は𠮟られた"),
        (["鳴く", "\n\n"], "吾輩は𠮟られた。"),
        (["られた。\n\n　「A"], "吾輩は𠮟"),
        (["られた。\n\n　「B"], TEXT),
        (["吾"], ""),
        ([""], TEXT),
        (["。"] * 3 + ["「"], "吾輩は𠮟られた"),
    ],
    ids=str,
)
def test_stop_strings(tokenizer: Tokenizer, stop: list[str], expected: str) -> None:
    """A stop string may span tokens; none of its characters come out, but those of a mere beginning do."""
    text = TextStream(tokenizer, [tokenizer.end_of_text_id], 0, stop)
    assert "".join(pieces_of(text, tokenizer.encode(TEXT))) == expected
    assert text.finish_reason == ("length" if expected == TEXT else "stop")


class Reciting(Bigrams):
    """A model that continues any id of a text, in which all ids differ, with the rest of the text."""

    def __init__(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        table = torch.zeros(tokenizer.vocab_size, tokenizer.vocab_size)
        for now, following in itertools.pairwise([*ids, tokenizer.end_of_text_id]):
            table[now, following] = 100
        super().__init__(table)


def test_texts_are_generated_at_once_each_to_its_own_end(tokenizer: Tokenizer) -> None:
    ids = list(dict.fromkeys(tokenizer.encode("春は花、夏は祭り。秋になれば月を見て冬は雪。")))
    model = Reciting(tokenizer, ids)
    full = tokenizer.decode_continuation(ids[:1], ids[1:])
    texts = [TextStream(tokenizer, ids[:1], 0, stop) for stop in ([], [full[5:7]], [])] + [
        TextStream(tokenizer, ids[-1:], 0)
    ]
    continuations = ["", "", "", ""]
    for row, piece in stream_text(model, texts, GREEDY, len(ids), CONTEXT):
        continuations[row] += piece
    assert continuations == [full, full[:5], full, ""]
    assert [text.finish_reason for text in texts] == ["end_of_text", "stop", "end_of_text", "end_of_text"]
    assert texts[0].n_new == len(ids) - 1
    short = TextStream(tokenizer, ids[:1], 0)
    assert "".join(
        piece for _, piece in stream_text(model, [short], GREEDY, 3, CONTEXT)
    ) == tokenizer.decode_continuation(ids[:1], ids[1:4])
    assert (short.finish_reason, short.n_new) == ("length", 3)
