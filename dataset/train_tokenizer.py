"""Train a SentencePiece model (spiece.model) on text shards, and measure it on held-out documents (report.json).

The text is not changed: no normalisation, no space added before it, each newline is a token, U+3000 is a character
like others, and characters without a piece become UTF-8 bytes. So any text comes back unchanged, with one exception:
inside SentencePiece "▁" (U+2581) stands for a space, and encode() below shows how to encode a real one.

Training sees a sample, drawn evenly over the corpus, without the held-out documents. The same text and flags give the
same bytes. The text shards are those of prepare_aozora_jsonl.py, or a folder of .txt files.
SentencePiece: Kudo & Richardson 2018; unigram: Kudo 2018; BPE: Sennrich et al. 2016.
"""

from _startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below

import argparse
import hashlib
import io
import os
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _corpus import Corpus, find_corpus, read
from _locks import LOCK_FILE, file_lock
from _script import (
    Parser,
    UserError,
    check_output_dir,
    has_format,
    json_bytes,
    log,
    probe_files,
    run_script,
    write_synced,
)
from _unigram import round_scores

FORMAT = "gptkit-tokenizer-report"
MODEL_FILE, REPORT_FILE, PARTIAL = "spiece.model", "report.json", ".partial"
MAX_LINE = 4096  # longer lines are cut for training: beyond 65,535 characters the trainer's positions overflow
HELD_OUT_SHARE = 1 / 50
N_FIXED_PIECES = 3 + 1 + 256 + 1  # unknown, end of text, padding; newline; bytes; the space
MIN_VOCAB_SIZE, MAX_VOCAB_SIZE = 300, 1_000_000
RESERVED = "▁▅\0"  # not pieces: the library's own space, a sign for which it drops the line, one no piece can hold


def parse_arguments() -> argparse.Namespace:
    parser = Parser("text shards -> a SentencePiece model")
    parser.add_argument("--data_dir", required=True, help="folder of text shards, or of .txt files")
    parser.add_argument("--output_dir", required=True, help="folder for spiece.model; an earlier result is replaced")
    parser.add_argument("--vocab_size", type=int, default=16000, help="pieces, with the special ones (16000)")
    parser.add_argument("--model_type", choices=("bpe", "unigram"), default="bpe", help="how pieces are found (bpe)")
    parser.add_argument("--max_chars", type=int, default=5_000_000,
                        help="characters to train on, 100 bytes of memory each (5000000)")  # fmt: skip
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    """Raise UserError for wrong flags and folders, before anything is read."""
    if not MIN_VOCAB_SIZE <= options.vocab_size <= MAX_VOCAB_SIZE:
        reason = f"{N_FIXED_PIECES} pieces are bytes and special ones; give {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}"
        raise UserError(f"--vocab_size {options.vocab_size} is too small or too large: {reason}, such as 16000")
    if options.max_chars < 1:
        raise UserError(f"--max_chars {options.max_chars} leaves no text to train on; give more, such as 5000000")
    check_output_dir(Path(options.output_dir), lambda name: True)  # what it holds is checked when it is locked


@dataclass
class Document:
    """What training needs to know about a document before reading its text again."""

    characters: int = 0
    hash: int = 0
    is_blank: bool = True  # such as a newline after the last separator; not counted as a document
    is_held_out: bool = False


def survey(corpus: Corpus) -> list[Document]:
    """Return the documents by number. Those with the lowest hashes are held out: at least one, where there are two.

    Where these are most of the text (a long document and a short one), they are trained on and the others are held out.
    pretokenize.py chooses whole validation documents in the same way, fewer of them: this tokenizer has not seen them.
    """
    documents: list[Document] = []
    digest = hashlib.sha256()
    for number, text in read(corpus):
        if number == len(documents):
            documents.append(Document())
            digest = hashlib.sha256()
        digest.update(text.encode())
        document = documents[number]
        document.characters += len(text)
        document.hash = int.from_bytes(digest.digest()[:8], "big")
        document.is_blank = document.is_blank and not text.strip()
    hashes = sorted({document.hash for document in documents if not document.is_blank})
    if not hashes:
        raise UserError(f"{corpus.files[0].parent} holds no text, only blank files; give text in --data_dir")
    threshold = max(int(HELD_OUT_SHARE * 2**64), hashes[0] + 1)
    if hashes[-1] < threshold:  # all are low; hold out one, or none where there is only one
        threshold = hashes[0] + (len(hashes) > 1)
    n_low = sum(document.characters for document in documents if document.hash < threshold)
    is_most = 3 * n_low > 2 * sum(document.characters for document in documents)
    for document in documents:
        document.is_held_out = (document.hash < threshold) != is_most and not document.is_blank
    return documents


def sample(corpus: Corpus, documents: list[Document], max_chars: int) -> list[str]:
    """Return lines of the documents not held out: all, or as many as max_chars allows, drawn evenly over the corpus.

    Lines are returned without their newline, which is always a piece of its own.
    """
    lines: list[str] = []
    n_all, n_seen, n_taken = sum(document.characters for document in documents if not document.is_held_out), 0, 0
    for number, text in read(corpus):
        if documents[number].is_held_out:
            continue
        for line in re.findall(f"[^\n]{{1,{MAX_LINE}}}", text):
            n_seen += len(line)
            if n_taken * n_all < n_seen * max_chars:
                lines.append(line)
                n_taken += len(line)
    return lines


def characters_with_a_piece(lines: list[str], vocab_size: int) -> set[str]:
    """Return the characters frequent enough to be worth a piece; the others become bytes.

    A rare character saves two tokens where it occurs, a merge of two pieces one: measured on Aozora Bunko, for 400 to
    32,000 pieces, characters per token are at most 1 % from the best where the bound is 4 / vocab_size^1.5 of the text.
    """
    counts = Counter("".join(lines))
    bound = 4 * counts.total() / vocab_size**1.5
    by_frequency = sorted(counts, key=lambda character: (-counts[character], character))
    worth_it = [c for c in by_frequency if counts[c] >= bound and c not in RESERVED]
    return set(worth_it[: (vocab_size - N_FIXED_PIECES) * 3 // 4])


def training_lines(lines: list[str], characters: set[str]) -> Iterator[str]:
    """Yield the lines, split at each character that has no piece."""
    without = {ord(c): "\n" for line in lines for c in set(line) - characters}
    for line in lines:
        yield from filter(None, line.translate(without).split("\n"))


def run_trainer(lines: list[str], vocab_size: int, model_type: str) -> bytes:
    """Train with the library and return the model. Raises RuntimeError, as the library does."""
    model = io.BytesIO()
    # The library ignores Ctrl-C; nothing is on the disk yet, so the signal may end the process at once.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=training_lines(lines, characters_with_a_piece(lines, vocab_size)),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=1.0,  # of what training_lines leaves
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            user_defined_symbols=["\n"],
            required_chars="▁",  # without its own piece a space becomes the bytes of "▁", and does not come back
            split_by_unicode_script=False,  # "た。" and "　私は" may be pieces: 8 % more characters per token
            max_sentence_length=4 * MAX_LINE,  # in bytes; longer ones would be left out without a warning
            seed_sentencepiece_size=200_000,  # instead of 1,000,000: the same quality in half the time
            num_threads=16,  # unigram's result depends on it, so it is the same on every machine
            minloglevel=2,  # errors only
        )
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    return round_scores(model.getvalue()) if model_type == "unigram" else model.getvalue()


def train(lines: list[str], vocab_size: int, model_type: str) -> bytes:
    """Train and return the model. Raises UserError; for too large a vocabulary it names the largest possible one."""
    size = vocab_size
    while True:
        try:
            model = run_trainer(lines, size, model_type)
        except RuntimeError as error:
            too_large = re.search(r"set it to a value <= (\d+)", str(error))
            if not too_large or int(too_large[1]) < MIN_VOCAB_SIZE:
                reason = "there is too little text" if too_large or "sentences_.empty" in str(error) else str(error)
                raise UserError(f"no tokenizer of --vocab_size {vocab_size}: {reason}; give more text in --data_dir")
            size = int(too_large[1])  # fewer pieces leave fewer characters, hence fewer candidates: try again
            continue
        if size < vocab_size:
            raise UserError(f"--vocab_size {vocab_size} is too large for this text; the largest possible is {size}")
        return model


def encode(processor: Any, text: str) -> list[int]:
    """Return the ids of a text. A "▁" in it is encoded as its bytes: as a character it would come back as a space."""
    mark = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "▁".encode()]
    first, *others = processor.encode(text.split("▁"))
    return first + [i for ids in others for i in (*mark, *ids)]


def measure(model: bytes, corpus: Corpus, documents: list[Document]) -> dict[str, Any]:
    """Measure the model on the held-out documents, or on all where none is held out."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    n_held_out = sum(document.is_held_out for document in documents)
    characters, tokens, unknown, lossless = 0, 0, 0, True
    for number, text in read(corpus):
        if documents[number].is_held_out or not n_held_out:
            ids = encode(processor, text)
            characters += len(text)
            tokens += len(ids)
            unknown += ids.count(processor.unk_id())
            lossless = lossless and processor.decode(ids) == text
    return {
        "held_out_works": n_held_out,  # 0: measured on the training text
        "characters": characters,
        "tokens": tokens,
        "characters_per_token": round(characters / tokens, 4),
        "unknown_tokens": unknown,
        "lossless": lossless,
    }


def publish(output: Path, model: bytes, report: dict[str, Any]) -> None:
    """Write both files aside, then rename them; by the folder `.partial` a later run knows that they are ours."""
    partial = output / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)  # left by a run that was killed
    partial.mkdir()
    contents = {MODEL_FILE: model, REPORT_FILE: json_bytes(report)}
    try:
        for name, content in contents.items():
            write_synced(partial / name, content)
        (output / REPORT_FILE).unlink(missing_ok=True)
        for name in contents:
            os.replace(partial / name, output / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def train_tokenizer(corpus: Corpus, options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure and write the model; return the report."""
    log(f"reading {options.data_dir}")
    documents = survey(corpus)
    lines = sample(corpus, documents, options.max_chars)
    counted = [document for document in documents if not document.is_blank]
    report = {
        "format": FORMAT,
        "version": 1,
        "model_type": options.model_type,
        "vocab_size": options.vocab_size,
        "works": len(counted),
        "characters": sum(document.characters for document in counted),
        "trained_on_characters": sum(map(len, lines)),
    }
    log(f"training {options.model_type} of {options.vocab_size} pieces on {report['trained_on_characters']}"
        f" of {report['characters']} characters, {sum(d.is_held_out for d in counted)} of {len(counted)} documents held out")  # fmt: skip
    start = time.monotonic()
    model = train(lines, options.vocab_size, options.model_type)
    log(f"trained in {time.monotonic() - start:.0f} s; measuring")
    report |= {"sha256": hashlib.sha256(model).hexdigest(), "measured": measure(model, corpus, documents)}
    publish(Path(options.output_dir), model, report)
    return report


def main() -> None:
    options = parse_arguments()
    check(options)
    output = Path(options.output_dir)
    with file_lock(output / LOCK_FILE):
        is_ours = (output / PARTIAL).is_dir() or has_format(output / REPORT_FILE, FORMAT)
        check_output_dir(output, lambda name: is_ours and name in (MODEL_FILE, REPORT_FILE, PARTIAL))
        probe_files(output)
        report = train_tokenizer(find_corpus(Path(options.data_dir)), options)
    found = report["measured"]
    where = f"{found['held_out_works']} held-out documents" if found["held_out_works"] else "the training text"
    print(f"{output / MODEL_FILE}: {options.vocab_size} pieces; on {where} {found['characters_per_token']:.3f} characters"
          f" per token ({found['characters']} / {found['tokens']}), {found['unknown_tokens']} unknown,"
          f" lossless: {'yes' if found['lossless'] else 'no'}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
