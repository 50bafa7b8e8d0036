"""Files from strangers, damaged and hostile ones: each is read for what it is, or refused in one line.

Each kind of file is changed in hundreds of ways drawn from a fixed seed: bytes flipped, cut, doubled; in JSON, values
replaced by others that a writer of mischief would choose. Where a checksum stands over a file, it is made to fit
again, as a stranger would. Any other exception, a crash of a library, or memory taken for what a header claims fails.
"""

import gzip
import hashlib
import json
import lzma
import random
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import torch
from conftest import ROOT, SAMPLE_TOKENIZER, run_command, write_jsonl

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.data.pretokenization import describe_tokens, load_manifest, open_tokens, pretokenize
from gptkit.data.text_shards import documents_of_shard, find_text_shards
from gptkit.data.token_shards import open_token_shard, token_shard_bytes
from gptkit.evaluation.documents import read_documents
from gptkit.text.backends import TiktokenBackend, TokenizersBackend
from gptkit.text.tokenizer import Tokenizer, load_saved_tokenizer, load_sentencepiece
from gptkit.training import checkpoints

HOSTILE = [
    None, True, -1, 0, 1.5, 1e308, -0.0, float("nan"), 2**31, 2**53, 2**70, "", "x", "../../../etc/passwd", "/etc/passwd",
    "a\0b", "\ud800", "x" * 5000, [], {}, [[]], [None] * 50, {"x": 1},
]  # fmt: skip
MOST_GROWTH = 300 << 20  # bytes that the process may grow by while it reads a file of kilobytes


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """The same, damaged at one to four places."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(changed) + 1)
        end = min(start + draw.choice((1, 1, 4, 8, 64, 1000)), len(changed))
        how = draw.randrange(5)
        if how == 0:
            del changed[start:end]
        elif how == 1:
            changed[start:start] = changed[start:end]
        elif how == 2:
            changed[start:end] = draw.randbytes(end - start)
        elif how == 3:
            changed[start:end] = b"\xff" * (end - start)
        elif start < len(changed):
            changed[start] ^= 1 << draw.randrange(8)
    return bytes(changed)


def changed_json(value: Any, draw: random.Random) -> Any:
    """The same with one value in it, drawn at any depth, replaced, taken away or given another name."""
    value = json.loads(json.dumps(value))
    holder, key = draw.choice(list(places(value)))
    how = draw.randrange(4)
    if how == 0 and isinstance(holder, dict):
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[draw.choice(("x", "", "../x"))] = holder.pop(key)
    else:
        holder[key] = draw.choice(HOSTILE)
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places(value[key])


def tried(change: Callable[[], object], read: Callable[[], object], n: int) -> tuple[int, int]:
    """Change and read so often; how many were read, and how many refused. Fails on any other end."""
    n_read = 0
    before = peak_bytes()
    for _ in range(n):
        change()
        try:
            read()
            n_read += 1
        except UserError:
            continue
    assert peak_bytes() - before < MOST_GROWTH
    return n_read, n - n_read


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt"])
def test_texts(name: str, tmp_path: Path) -> None:
    draw = random.Random(0)
    path = write_jsonl(tmp_path / name, [f"第{i}の作品。\n" * 20 for i in range(20)], author="名前")
    content = path.read_bytes()
    content = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)(content)

    def read() -> None:
        for work in read_documents(path):
            work.encode()

    n_read, n_refused = tried(lambda: path.write_bytes(changed_bytes(content, draw)), read, 300)
    assert n_refused > 20
    assert n_read > 0 or name.endswith("z")  # a compressed file has a checksum of its own


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path) -> None:
    """A compressed file of a megabyte that is a line of a gigabyte."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    before = peak_bytes()
    with pytest.raises(UserError, match="line 1: longer than 32 MiB"):
        list(read_documents(path))
    assert peak_bytes() - before < MOST_GROWTH


def test_jsonl_by_the_command_that_prepares_it(tmp_path: Path) -> None:
    """Files of a few works are prepared or refused by the real command's own functions, in one process."""
    script = f"""
import json, pathlib, random, sys
sys.path[:0] = [{str(ROOT / "dataset")!r}, {str(ROOT / "tests")!r}, {str(ROOT)!r}]
sys.argv[1:] = ["--jsonl_path", "a.jsonl", "--output_dir", "out"]
import prepare_aozora_jsonl as prepare, test_strangers as strangers
from _script import UserError
draw = random.Random(0)
lines = [json.dumps(dict(text="文。" * 30, meta=dict(x="y")), ensure_ascii=False) for _ in range(5)]
n = dict(read=0, refused=0)
for i in range(300):
    if i % 2:
        content = strangers.changed_bytes("\\n".join(lines).encode(), draw)
    else:
        content = "\\n".join([*lines, json.dumps(strangers.changed_json(json.loads(lines[0]), draw))]).encode()
    pathlib.Path("a.jsonl").write_bytes(content)
    try:
        prepare.main()
        n["read"] += 1
    except UserError:
        n["refused"] += 1
print(json.dumps(n))
"""
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    counts = json.loads(result.stdout.splitlines()[-1])
    assert min(counts.values()) > 20


def test_manifests_of_text_shards(tmp_path: Path, sample_shards: Path) -> None:
    draw = random.Random(1)
    folder = shutil.copytree(sample_shards, tmp_path / "001")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))

    def change() -> None:
        (folder / "manifest.json").write_text(json.dumps(changed_json(manifest, draw)), "utf-8")

    def read() -> None:
        text = find_text_shards(folder)
        assert all(path.parent == folder for path in text.paths)
        for index in range(len(text.paths)):
            for work in documents_of_shard(text, index):
                assert work

    assert min(tried(change, read, 300)) > 20


def test_token_folders(tmp_path: Path, sample_shards: Path, tokenizer: Tokenizer) -> None:
    """The manifest alone, as on a machine without the text."""
    draw = random.Random(2)
    folder = tmp_path / "tokens"
    made = pretokenize(sample_shards, folder, tokenizer, 0.1)

    def change() -> None:
        (folder / "manifest.json").write_text(json.dumps(changed_json(made, draw)), "utf-8")

    def read() -> None:
        manifest = load_manifest(folder, tokenizer)
        describe_tokens(manifest)
        for stream in open_tokens(folder, manifest).values():
            assert len(stream) == 0 or int(stream.read(0, len(stream)).max()) < tokenizer.vocab_size

    n_read, n_refused = tried(change, read, 500)
    assert n_refused > 300
    assert n_read > 20  # what says nothing of the tokens: their sources, the tokenizer's name

    shard = json.loads(json.dumps(made))
    record = shard["shards"][0]["train"]
    tokens = open_token_shard(folder / record["file"], made["dtype"], record["tokens"]).copy()
    tokens[5] = tokenizer.vocab_size  # an id that the model has no row for, and all sums made to fit
    content = token_shard_bytes(tokens)
    (folder / record["file"]).write_bytes(content)
    record["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(shard), "utf-8")
    with pytest.raises(UserError, match=rf"has the id {tokenizer.vocab_size}, and the tokenizer has"):
        load_manifest(folder, tokenizer)


def test_records_of_token_shards(tmp_path: Path, sample_shards: Path, tokenizer: Tokenizer) -> None:
    """A record that does not hold is made anew: the folder is what it would be in any case."""
    draw = random.Random(3)
    folder = tmp_path / "tokens"
    made = pretokenize(sample_shards, folder, tokenizer, 0.1)
    path = folder / "combined_0001.json"
    record = json.loads(path.read_text("utf-8"))
    for _ in range(60):
        path.write_text(json.dumps(changed_json(record, draw)), "utf-8")
        try:
            found = pretokenize(sample_shards, folder, tokenizer, 0.1)
        except UserError:  # it is no record at all, so something else's file, which is not overwritten
            path.write_text(json.dumps(record), "utf-8")
            found = pretokenize(sample_shards, folder, tokenizer, 0.1)
        assert found == made


def test_token_shards(tmp_path: Path) -> None:
    draw = random.Random(4)
    path = tmp_path / "train_a.npy"
    content = token_shard_bytes(torch.arange(500).numpy().astype("uint16"))
    header = content.index(b"\n")
    n_refused = 0
    for i in range(500):
        head = changed_bytes(content[:header], draw) if i % 2 else content[:header]
        path.write_bytes(head + (content[header:] if i % 2 else changed_bytes(content[header:], draw)))
        try:
            assert len(open_token_shard(path, "uint16", 500)) == 500
        except ValueError:
            n_refused += 1
    assert n_refused > 300


def small_tokenizer(kind: str) -> Tokenizer:
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


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "tiktoken"])
def test_tokenizer_folders(kind: str, tmp_path: Path) -> None:
    """In a process of its own: a library that crashes is found, and takes no test with it."""
    script = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pathlib, test_strangers
test_strangers.read_changed_tokenizers({kind!r}, pathlib.Path({str(tmp_path)!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    n_read, n_refused = map(int, result.stdout.split())
    assert n_refused > 20
    assert n_read + n_refused == 200


def read_changed_tokenizers(kind: str, folder: Path) -> None:
    draw = random.Random(5)
    files = small_tokenizer(kind).files()

    def change() -> None:
        chosen = draw.choice(list(files))
        for name, content in files.items():
            if name == chosen and name.endswith(".json") and draw.random() < 0.7:
                content = json.dumps(changed_json(json.loads(content), draw)).encode()
            elif name == chosen:
                content = changed_bytes(content, draw)
            (folder / name).write_bytes(content)

    def read() -> None:
        tokenizer = load_saved_tokenizer(folder)
        ids = tokenizer.encode("吾輩は猫である。\n名前はABC 𠮟る")
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert isinstance(tokenizer.decode(range(min(tokenizer.vocab_size, 1000))), str)
        assert 0 <= tokenizer.end_of_text_id < tokenizer.vocab_size

    print(*tried(change, read, 200))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    config = GPTConfig(tokenizer.vocab_size, context_length=8, emb_dim=8, n_layers=1, n_heads=2, arch="modern")
    model = GPTModel(config)
    state = {"step": 1, "val_loss": 2.0, "identity": {"model": vars(config)}}
    folder = tmp_path_factory.mktemp("run")
    return checkpoints.save_checkpoint(folder, state, model.state_dict(), {"x": torch.zeros(3)}, tokenizer.files())


def test_checkpoints(checkpoint: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    draw = random.Random(6)
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    state = json.loads((folder / checkpoints.STATE_FILE).read_text("utf-8"))
    weights = (folder / checkpoints.MODEL_FILE).read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    files = [folder / checkpoints.STATE_FILE, folder / checkpoints.MODEL_FILE, folder / checkpoints.TRAINING_FILE]
    files += sorted((folder / "tokenizer").iterdir())

    def change() -> None:
        how = draw.randrange(3)
        (folder / checkpoints.STATE_FILE).write_text(
            json.dumps(changed_json(state, draw) if how == 0 else state), "utf-8"
        )
        content = weights
        if how == 1:
            changed = json.dumps(changed_json(header, draw)).encode()
            content = struct.pack("<Q", len(changed)) + changed + weights[8 + length :]
        elif how == 2:
            content = changed_bytes(weights[: 8 + length], draw) + weights[8 + length :]
        (folder / checkpoints.MODEL_FILE).write_bytes(content)
        checkpoints.write_sums(folder, files)

    def read() -> None:
        chosen = checkpoints.choose_checkpoint(str(folder), "newest")
        model = checkpoints.load_model(
            chosen, lambda dimensions: GPTModel(GPTConfig(**dimensions)), tokenizer.vocab_size, torch.device("cpu")
        )
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))

    assert min(tried(change, read, 600)) > 40


def test_a_damaged_run_folder_by_the_real_command(checkpoint: Path, tmp_path: Path) -> None:
    """One of each, from the outside: no traceback."""
    draw = random.Random(7)
    for name in ("state.json", "SHA256SUMS", "model.safetensors"):
        folder = shutil.copytree(checkpoint, tmp_path / name / checkpoint.name)
        (folder / name).write_bytes(changed_bytes((folder / name).read_bytes(), draw))
        result = run_command("inference.py", "--exp_dir", folder, "--prompt", "雨")
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
