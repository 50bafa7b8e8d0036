"""gptkit/evaluation: losses and bits computed by hand and by transformers, windows, and files that hold no documents."""

import gzip
import json
import lzma
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SEPARATOR, write_jsonl
from test_gpt_model import CONTEXT, VOCAB, hugging_face_twin, random_ids, random_model
from torch import nn
from torch.nn import functional as F

from gptkit.base.cli import UserError
from gptkit.evaluation.documents import read_documents
from gptkit.evaluation.scoring import mean_loss, score_documents

CPU = torch.device("cpu")
Forward = Callable[[torch.Tensor], torch.Tensor]


def mean_loss_by(model: nn.Module, forward: Forward, dtype: torch.dtype = torch.float32) -> float:
    """Return mean_loss over uneven_batches."""

    def loss_of_batch(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(forward(ids).float().flatten(0, 1), targets.flatten())

    return mean_loss(model, loss_of_batch, uneven_batches(), CPU, dtype)


def uneven_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches of four sequences and of one, of other lengths: their means differ from the mean over tokens."""
    long, short = random_ids(4, 21, seed=1), random_ids(1, 8, seed=2)
    return [(ids[:, :-1], ids[:, 1:]) for ids in (long, short)]


def test_each_token_counts_the_same() -> None:
    model, batches = random_model(), uneven_batches()
    with torch.no_grad():
        nats = [
            F.cross_entropy(model(inputs).double().flatten(0, 1), targets.flatten(), reduction="none")
            for inputs, targets in batches
        ]
    expected = torch.cat(nats).mean().item()
    assert abs(expected - (nats[0].mean() + nats[1].mean()).item() / 2) > 1e-2
    assert mean_loss_by(model, model) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_random_numbers_or_gradients(training: bool) -> None:
    model, dropping = random_model(), random_model(drop_rate=0.5)
    dropping.train(training)
    before = torch.get_rng_state()
    expected = mean_loss_by(model, model)
    assert mean_loss_by(dropping, dropping) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training is training for module in dropping.modules())
    assert all(parameter.grad is None for parameter in dropping.parameters())
    assert torch.is_grad_enabled()


def test_the_loss_is_computed_in_bfloat16() -> None:
    model = random_model()
    seen = []

    def forward(ids: torch.Tensor) -> torch.Tensor:  # a compiled model stands here
        logits = model(ids)
        seen.append((logits.dtype, logits.requires_grad))
        return logits

    exact = mean_loss_by(model, forward)
    rough = mean_loss_by(model, forward, torch.bfloat16)
    assert seen == [(torch.float32, False)] * 2 + [(torch.bfloat16, False)] * 2
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)


def test_uniform_logits_cost_ln_of_the_vocabulary() -> None:
    class Uniform(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*ids.shape, 128)

    model = Uniform()
    assert mean_loss_by(model, model) == pytest.approx(4.852030263919617)  # ln 128


class Letters:
    """A tokenizer for which 0 is end-of-text, 1 is unknown, and a, b, … are 2, 3, …"""

    end_of_text_id = 0

    def __init__(self, n_letters: int = 2, unknown_id: int | None = 1) -> None:
        self.unknown_id = unknown_id
        self.ids = {chr(ord("a") + i): 2 + i for i in range(n_letters)}

    def encode(self, text: str) -> list[int]:
        return [self.ids.get(character, 1) for character in text]


def letters(n: int, n_letters: int = VOCAB - 2, seed: int = 0) -> str:
    """Return a document of n random characters that Letters(n_letters) knows."""
    drawn = torch.randint(n_letters, (n,), generator=torch.Generator().manual_seed(seed))
    return "".join(chr(ord("a") + i) for i in drawn.tolist())


def recording(forward: Forward) -> tuple[Forward, list[list[list[int]]]]:
    """Return `forward`, and the list of the batches of ids that it is called with."""
    batches: list[list[list[int]]] = []

    def recorded(ids: torch.Tensor) -> torch.Tensor:
        batches.append(ids.tolist())
        return forward(ids)

    return recorded, batches


def by_position(ids: torch.Tensor) -> torch.Tensor:
    """Return logits by which "a" (2) and end-of-text (0) cost i bits each where i ids of the window precede them."""
    logits = torch.full((*ids.shape, 3), -torch.inf)
    bits = torch.arange(1.0, ids.shape[1] + 1)
    logits[..., 0] = logits[..., 2] = -bits * math.log(2)
    logits[..., 1] = torch.log(1 - 2 ** (1 - bits))
    return logits


def test_bits_by_hand() -> None:
    """Probabilities of the next id that depend on the last one alone."""
    table = torch.tensor(  # columns: end-of-text, unknown, a, b
        [[1 / 8, 1 / 8, 1 / 2, 1 / 4], [1 / 2, 1 / 4, 1 / 8, 1 / 8], [1 / 4, 1 / 8, 1 / 8, 1 / 2], [1 / 4] * 4]
    )
    forward, batches = recording(lambda ids: table[ids].log())
    score = score_documents(forward, Letters(), ["aab", "b鬱a\n"], 8)
    assert batches == [[[0, 2, 2, 3]], [[0, 3, 1, 2, 1]]]  # each document alone, after end-of-text
    first_bits, second_bits = 1 + 3 + 1 + 2, 2 + 2 + 3 + 3 + 1  # the last of each is end-of-text's
    assert (score.documents, score.characters, score.tokens, score.unknown_tokens) == (2, 7, 9, 2)
    assert score.bits_per_char == pytest.approx((first_bits + second_bits + 2 * 12.5) / 7, rel=1e-6)
    assert score.loss == pytest.approx(18 * math.log(2) / 9, rel=1e-6)  # without the charge for unknown tokens
    assert score.perplexity == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(
    ("stride", "windows", "bits"),
    [
        (None, [(0, 4), (2, 6), (4, 7)], (1 + 2 + 3 + 4) + (3 + 4) + 3),
        (1, [(0, 4), (1, 5), (2, 6), (3, 7)], (1 + 2 + 3 + 4) + 4 + 4 + 4),
        (4, [(0, 4), (4, 7)], (1 + 2 + 3 + 4) + (1 + 2 + 3)),
    ],
)
def test_windows_by_hand(stride: int | None, windows: list[tuple[int, int]], bits: int) -> None:
    """Eight ids, seven of them predicted, through a context of four."""
    ids = [0, 2, 2, 2, 2, 2, 2, 0]
    forward, batches = recording(by_position)
    score = score_documents(forward, Letters(), ["aaaaaa"], 4, stride=stride, batch_size=1)
    assert [row for (row,) in batches] == [ids[start:end] for start, end in windows]
    assert (score.tokens, score.characters) == (7, 6)
    assert score.bits_per_char == pytest.approx(bits / 6, rel=1e-6)


@pytest.mark.parametrize(
    ("n_characters", "windows"),
    [(0, [1]), (1, [2]), (3, [4]), (4, [4, 3]), (5, [4, 4]), (6, [4, 4, 3]), (7, [4, 4, 4])],
)
def test_no_window_more_than_the_document_needs(n_characters: int, windows: list[int]) -> None:
    forward, batches = recording(by_position)
    score = score_documents(forward, Letters(), ["a" * n_characters], 4, batch_size=1)
    assert [len(row) for (row,) in batches] == windows
    assert score.tokens == n_characters + 1


@pytest.mark.parametrize("context_length", [1, 5])
def test_half_of_an_odd_context(context_length: int) -> None:
    """A context of five moves by two, one of one by one."""
    bits = {1: 1 * 13, 5: (1 + 2 + 3 + 4 + 5) + (4 + 5) * 4}[context_length]
    score = score_documents(by_position, Letters(), ["a" * 12], context_length)
    assert score.bits_per_char == pytest.approx(bits / 12, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("stride", [None, 5, 1])
def test_token_by_token(stride: int | None, batch_size: int) -> None:
    """Each token is computed alone, in the first window that has half a context before it (or in the very first)."""
    model, tokenizer = random_model(), Letters(VOCAB - 2)
    documents = [letters(n, seed=n) for n in (70, 7, CONTEXT - 1, CONTEXT, 40)]
    step, nats = stride or CONTEXT // 2, 0.0
    for document in documents:
        ids = torch.tensor([0, *tokenizer.encode(document), 0])
        for i in range(1, len(ids)):
            starts = (s for s in range(0, i, step) if i - s <= CONTEXT and (s == 0 or i - s >= CONTEXT / 2))
            with torch.no_grad():
                logits = model(ids[None, next(starts) : i])[0, -1].double()
            nats -= logits.log_softmax(0)[ids[i]].item()
    score = score_documents(model, tokenizer, documents, CONTEXT, stride=stride, batch_size=batch_size)
    assert score.tokens == sum(map(len, documents)) + len(documents)
    assert score.loss == pytest.approx(nats / score.tokens, rel=1e-5)
    assert score.bits_per_char == pytest.approx(nats / math.log(2) / sum(map(len, documents)), rel=1e-5)


def test_equals_transformers() -> None:
    model, tokenizer = random_model(), Letters(VOCAB - 2)
    twin = hugging_face_twin(model)
    ours = score_documents(model, tokenizer, [letters(60), letters(9)], CONTEXT)
    theirs = score_documents(lambda ids: twin(ids).logits, tokenizer, [letters(60), letters(9)], CONTEXT)
    assert ours.bits_per_char == pytest.approx(theirs.bits_per_char, rel=1e-5)

    document = letters(CONTEXT - 2, seed=1)  # one window, and its loss as transformers has it
    ids = torch.tensor([[0, *tokenizer.encode(document), 0]])
    with torch.no_grad():
        loss = twin(ids, labels=ids).loss.item()
    assert loss > 3  # so that 1e-5 says something
    assert score_documents(model, tokenizer, [document], CONTEXT).loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("unknown_id", [None, 50])
def test_uniform_logits_cost_log2_of_the_vocabulary_per_token(unknown_id: int | None) -> None:
    documents = [letters(n, 20) for n in (100, 3, 31)]
    tokenizer = Letters(20, unknown_id)
    score = score_documents(lambda ids: torch.zeros(*ids.shape, 128), tokenizer, documents, 16)
    assert (score.characters, score.tokens, score.unknown_tokens) == (134, 137, 0)
    assert score.bits_per_char == pytest.approx(7 * 137 / 134, rel=1e-7)
    assert score.perplexity == pytest.approx(128, rel=1e-5)


def test_windows_of_equal_length_are_batched() -> None:
    forward, batches = recording(by_position)
    score = score_documents(forward, Letters(), ["a" * 9, "a", "a" * 6, "a"], 4, batch_size=3)
    shapes = [(len(batch), len(batch[0])) for batch in batches]
    assert shapes == [(3, 4), (3, 4), (2, 2), (1, 3)]
    bits = (10 + 7 * 3) + (1 + 2) + (10 + 7 + 3) + (1 + 2)
    assert score.bits_per_char == pytest.approx(bits / 17, rel=1e-6)


def test_one_document_and_one_batch_at_a_time() -> None:
    events = []

    def documents() -> Iterator[str]:
        for i in range(3):
            events.append(f"document {i}")
            yield "a" * 7

    def forward(ids: torch.Tensor) -> torch.Tensor:
        events.append("batch")
        return by_position(ids)

    score_documents(forward, Letters(), documents(), 4, batch_size=2)
    assert events == ["document 0", "batch", "document 1", "batch", "batch", "document 2", "batch", "batch"]


def test_progress_counts_every_token() -> None:
    counts: list[int] = []
    score_documents(by_position, Letters(), ["a" * 9, "a" * 4], 4, batch_size=2, progress=counts.append)
    assert counts == [4 + 2, 2 + 2, 4, 1]


def test_documents_are_scored_in_bfloat16_without_gradients() -> None:
    model, tokenizer, documents = random_model(), Letters(VOCAB - 2), [letters(60)]
    seen = []

    def forward(ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids)
        seen.append((logits.dtype, logits.requires_grad))
        return logits

    exact = score_documents(forward, tokenizer, documents, CONTEXT)
    rough = score_documents(forward, tokenizer, documents, CONTEXT, dtype=torch.bfloat16)
    assert set(seen) == {(torch.float32, False), (torch.bfloat16, False)}
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)


DOCUMENTS = ["雨が降る。\n　猫が鳴く。\n", "</s>と<|endo", "𠮟る。"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_documents_of_jsonl(suffix: str, tmp_path: Path) -> None:
    content = write_jsonl(tmp_path / "plain.jsonl", [DOCUMENTS[0], " \n　", "", *DOCUMENTS[1:]]).read_bytes()
    path = tmp_path / f"works.jsonl{suffix}"
    path.write_bytes(
        {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](b"\xef\xbb\xbf\n" + content + b"\n")
    )
    assert list(read_documents(path)) == DOCUMENTS
    path.rename(tmp_path / "unpacked.jsonl.gz")  # the content decides, not the name
    assert list(read_documents(tmp_path / "unpacked.jsonl.gz")) == DOCUMENTS


@pytest.mark.parametrize("block_chars", [1, 5, 1 << 20])
def test_documents_of_text(block_chars: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptkit.evaluation.documents.BLOCK_CHARS", block_chars)
    path = tmp_path / "works.txt"
    path.write_text("".join(document + SEPARATOR for document in [DOCUMENTS[0], " \n", *DOCUMENTS[1:]]), "utf-8")
    assert list(read_documents(path)) == DOCUMENTS
    path.write_bytes(b"\xef\xbb\xbf" + f"雨。\r\n雪。{SEPARATOR}風。\r\n".encode())
    assert list(read_documents(path)) == ["雨。\n雪。", "風。\n"]


@pytest.mark.parametrize(("max_chars", "n_documents"), [(1, 1), (4, 1), (8, 1), (9, 2), (10, 2), (11, 3), (99, 3)])
def test_the_first_documents_alone(max_chars: int, n_documents: int, tmp_path: Path) -> None:
    documents = ["雨が降る", "雪が降った", "風。"]  # 4, 5 and 2 characters
    path = tmp_path / "works.txt"
    path.write_text(SEPARATOR.join(documents), "utf-8")
    assert list(read_documents(path, max_chars)) == documents[:n_documents]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"\xff", "not UTF-8"),
        ("雨が降る。".encode(), "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'["text"]', "not a JSON object"),
        (b'{"txt": "a"}', "no `text` that is a string"),
        (b'{"text": null}', "no `text` that is a string"),
        (b'{"text": "a\\ud800"}', "`text` has a lone surrogate at character 2"),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_a_line_that_is_no_document(line: bytes, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "works.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError) as caught:
        list(read_documents(path))
    assert str(caught.value).startswith(f"{path}: line 3: {problem}")
    assert 'such as {"text": "雨。"}' in str(caught.value)


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_compressed_file_cut_short(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "works.jsonl.xz"
    path.write_bytes(compress(json.dumps({"text": "雨" * 9}).encode())[:-9])
    with pytest.raises(
        UserError, match=r"works\.jsonl\.xz: damaged or cut short after line \d+ \(.*copy the file again"
    ):
        list(read_documents(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no text"),
        ("a.jsonl", b'{"text": "\\n "}\n', "only blank documents"),
        ("a.txt", b"", "holds no text"),
        ("a.txt", f" \n{SEPARATOR}　\n".encode(), "only blank documents"),
        ("a.txt", b"a\x93\xfa", "not UTF-8"),
        ("a.json", b'{"text": "a"}', r"neither JSONL nor text by its name; name one that ends in \.jsonl"),
    ],
)
def test_a_file_without_documents(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        list(read_documents(tmp_path / name))
