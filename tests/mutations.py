"""Damage files at random, and count how a reader takes it. Imports no torch, so that a process for it starts quickly."""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tiktoken
import tokenizers

from gptkit.base.cli import UserError
from gptkit.text.backends import TiktokenBackend, TokenizersBackend
from gptkit.text.tokenizer import Tokenizer, load_saved_tokenizer, load_sentencepiece

SAMPLE_TOKENIZER = Path(__file__).resolve().parent.parent / "dataset" / "sample" / "tokenizer"
HOSTILE = [
    None, True, -1, 0, 1.5, 1e308, -0.0, float("nan"), 2**31, 2**53, 2**70, "", "x", "../../../etc/passwd", "/etc/passwd",
    "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [None] * 50, {"x": 1},
]  # fmt: skip
MAX_GROWTH_BYTES = 300 << 20  # what the process may grow by while it reads a file of kilobytes


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Return the content damaged in one to four places."""
    mutated = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(mutated) + 1)
        end = min(start + rng.choice((1, 1, 4, 8, 64, 1000)), len(mutated))
        kind = rng.randrange(5)
        if kind == 0:
            del mutated[start:end]
        elif kind == 1:
            mutated[start:start] = mutated[start:end]
        elif kind == 2:
            mutated[start:end] = rng.randbytes(end - start)
        elif kind == 3:
            mutated[start:end] = b"\xff" * (end - start)
        elif start < len(mutated):
            mutated[start] ^= 1 << rng.randrange(8)
    return bytes(mutated)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a copy in which one value, drawn at any depth, is replaced by a hostile one, removed or renamed."""
    value = json.loads(json.dumps(value))
    holder, key = rng.choice(list(items_at_any_depth(value)))
    kind = rng.randrange(4)
    if kind == 0 and isinstance(holder, dict):
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("x", "", "../x"))] = holder.pop(key)
    else:
        holder[key] = rng.choice(HOSTILE)
    return value


def items_at_any_depth(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each dict or list in the value with each of its keys or indices."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from items_at_any_depth(value[key])


def count_outcomes(mutate: Callable[[], object], read: Callable[[], object], n: int) -> tuple[int, int]:
    """Mutate and read n times; return how many were read and how many refused by a UserError. Other errors propagate."""
    n_read = 0
    before = peak_bytes()
    for _ in range(n):
        mutate()
        try:
            read()
            n_read += 1
        except UserError:
            continue
    assert peak_bytes() - before < MAX_GROWTH_BYTES
    return n_read, n - n_read


def peak_bytes() -> int:
    """Return the most memory that this process has held; 0 on Windows."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def small_tokenizer(kind: str) -> Tokenizer:
    """Return a tokenizer with a backend of that kind."""
    if kind == "sentencepiece":
        return load_sentencepiece(str(SAMPLE_TOKENIZER))
    if kind == "tiktoken":
        ranks = {bytes([i]): i for i in range(256)} | {"の".encode()[:2]: 256, "の".encode(): 257}
        encoding = tiktoken.Encoding(
            "x", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 260}
        )
        return Tokenizer(TiktokenBackend.from_encoding(encoding), "x", "<|endoftext|>")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    trained.train_from_iterator(["吾輩は猫である。名前はまだ無い。"] * 3, trainer)
    return Tokenizer(TokenizersBackend(trained.to_str().encode()), "x", "</s>")


def read_mutated_tokenizers(kind: str, folder: Path) -> tuple[int, int]:
    """Read 200 mutations of a tokenizer's files; return how many were read and how many refused."""
    rng = random.Random(5)
    files = small_tokenizer(kind).files()

    def mutate() -> None:
        chosen = rng.choice(list(files))
        for name, content in files.items():
            if name == chosen and name.endswith(".json") and rng.random() < 0.7:
                content = json.dumps(mutate_json(json.loads(content), rng)).encode()
            elif name == chosen:
                content = mutate_bytes(content, rng)
            (folder / name).write_bytes(content)

    def read() -> None:
        tokenizer = load_saved_tokenizer(folder)
        ids = tokenizer.encode("吾輩は猫である。\n名前はABC 𠮟る")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(range(min(tokenizer.vocab_size, 1000))), str)
        assert 0 <= tokenizer.end_of_text_id < tokenizer.vocab_size

    return count_outcomes(mutate, read, 200)


def prepare_mutated_jsonl(dataset: Path) -> tuple[int, int]:
    """Prepare 300 mutations of a small JSONL in the current folder by the functions of the real command."""
    sys.path.insert(0, str(dataset))
    sys.argv[1:] = ["--jsonl_path", "a.jsonl", "--output_dir", "out"]
    os.fsync = lambda descriptor: None  # type: ignore[assignment]  # only the disk's speed would be measured
    import prepare_aozora_jsonl
    from _script import UserError as PreparationError

    rng = random.Random(0)
    lines = [json.dumps({"text": "文。" * 30, "meta": {"x": "y"}}, ensure_ascii=False) for _ in range(5)]
    n_read = 0
    for i in range(300):
        if i % 2:
            content = mutate_bytes("\n".join(lines).encode(), rng)
        else:
            content = "\n".join([*lines, json.dumps(mutate_json(json.loads(lines[0]), rng))]).encode()
        Path("a.jsonl").write_bytes(content)
        try:
            prepare_aozora_jsonl.main()
            n_read += 1
        except PreparationError:
            continue
    return n_read, 300 - n_read


if __name__ == "__main__":
    # A process of its own: a crash of a library ends it alone.
    what, folder = sys.argv[1:]
    print(*(prepare_mutated_jsonl(Path(folder)) if what == "jsonl" else read_mutated_tokenizers(what, Path(folder))))
