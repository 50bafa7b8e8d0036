"""Files from strangers, damaged and hostile ones: each is read for what it contains, or refused by a UserError.

Each kind of file is mutated in hundreds of ways drawn from a fixed seed (mutations.py): bytes are flipped, cut and
doubled; in JSON, values are replaced by hostile ones. Where a checksum covers a file, it is written again, as a stranger
would do. Any other exception, a crash of a library, or memory allocated because a header claims it, is a failure.
"""

import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE_TOKENIZER, call_command, environment, write_jsonl
from mutations import MAX_GROWTH_BYTES, count_outcomes, mutate_bytes, mutate_json, peak_bytes

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError
from gptkit.data.pretokenization import load_manifest, open_tokens, pretokenize
from gptkit.data.text_shards import documents_of_shard, find_text_shards
from gptkit.data.token_folder import describe_tokens
from gptkit.data.token_shards import open_token_shard, token_shard_bytes
from gptkit.evaluation.documents import read_documents
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece
from gptkit.training import checkpoints, loading

IMPORTS = {"PYTHONPATH": str(ROOT)}


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave files to the system: thousands of them would only measure the speed of the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.xz", "a.txt"])
def test_texts_are_read_or_refused(name: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write_jsonl(tmp_path / name, [f"第{i}の作品。\n" * 20 for i in range(20)], author="名前")
    content = path.read_bytes()
    content = {"gz": gzip.compress, "xz": lzma.compress}.get(name.rpartition(".")[2], bytes)(content)

    def read() -> None:
        for document in read_documents(path):
            document.encode()

    n_read, n_refused = count_outcomes(lambda: path.write_bytes(mutate_bytes(content, rng)), read, 300)
    assert n_refused > 20
    assert n_read > 0 or name.endswith("z")  # a compressed file has its own checksum


def test_a_line_that_never_ends_takes_no_memory(tmp_path: Path) -> None:
    """A compressed file of a megabyte that unpacks to one line of a gigabyte."""
    path = tmp_path / "bomb.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(1024):
            file.write(bytes(1 << 20))
    before = peak_bytes()
    with pytest.raises(UserError, match="line 1: longer than 32 MiB"):
        list(read_documents(path))
    assert peak_bytes() - before < MAX_GROWTH_BYTES


def test_jsonl_is_prepared_or_refused(tmp_path: Path) -> None:
    """In a process of its own: a script of dataset/ imports its own modules and reads the command line."""
    line = [sys.executable, str(ROOT / "tests" / "mutations.py"), "jsonl", str(ROOT / "dataset")]
    result = subprocess.run(
        line, cwd=tmp_path, env=environment() | IMPORTS, capture_output=True, encoding="utf-8", timeout=120
    )
    assert result.returncode == 0, result.stderr[-2000:]
    n_read, n_refused = map(int, result.stdout.splitlines()[-1].split())
    assert min(n_read, n_refused) > 20
    assert n_read + n_refused == 300


def test_manifests_of_text_shards_are_read_or_refused(tmp_path: Path, sample_shards: Path) -> None:
    rng = random.Random(1)
    folder = shutil.copytree(sample_shards, tmp_path / "001")
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))

    def mutate() -> None:
        (folder / "manifest.json").write_text(json.dumps(mutate_json(manifest, rng)), "utf-8")

    def read() -> None:
        text = find_text_shards(folder)
        assert all(path.parent == folder for path in text.paths)
        for index in range(len(text.paths)):
            for document in documents_of_shard(text, index):
                assert document

    assert min(count_outcomes(mutate, read, 300)) > 20


def test_manifests_of_token_shards_are_read_or_refused(
    tmp_path: Path, sample_shards: Path, tokenizer: Tokenizer
) -> None:
    """The folder of tokens alone, as on a machine without the text."""
    rng = random.Random(2)
    folder = tmp_path / "tokens"
    made = pretokenize(sample_shards, folder, tokenizer, 0.1)

    def mutate() -> None:
        (folder / "manifest.json").write_text(json.dumps(mutate_json(made, rng)), "utf-8")

    def read() -> None:
        manifest = load_manifest(folder, tokenizer)
        describe_tokens(manifest)
        for stream in open_tokens(folder, manifest).values():
            assert len(stream) == 0 or int(stream.read(0, len(stream)).max()) < tokenizer.vocab_size

    n_read, n_refused = count_outcomes(mutate, read, 500)
    assert n_refused > 300
    assert n_read > 20  # mutated where tokens do not depend on it: their sources, the tokenizer's name

    shard = json.loads(json.dumps(made))
    record = shard["shards"][0]["train"]
    tokens = open_token_shard(folder / record["file"], made["dtype"], record["tokens"]).copy()
    tokens[5] = tokenizer.vocab_size  # an id that the model has no row for, with all checksums written again
    content = token_shard_bytes(tokens)
    (folder / record["file"]).write_bytes(content)
    record["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(shard), "utf-8")
    with pytest.raises(UserError, match=rf"has the id {tokenizer.vocab_size}, and the tokenizer has"):
        load_manifest(folder, tokenizer)


def test_damaged_records_of_token_shards_are_replaced(
    tmp_path: Path, sample_shards: Path, tokenizer: Tokenizer
) -> None:
    """A record that is not valid is written again: the folder ends as it would without the damage."""
    rng = random.Random(3)
    folder = tmp_path / "tokens"
    made = pretokenize(sample_shards, folder, tokenizer, 0.1)
    path = folder / "combined_0001.json"
    record = json.loads(path.read_text("utf-8"))
    for _ in range(60):
        path.write_text(json.dumps(mutate_json(record, rng)), "utf-8")
        try:
            found = pretokenize(sample_shards, folder, tokenizer, 0.1)
        except UserError:  # it is not a record at all, so another program's file, which is not overwritten
            path.write_text(json.dumps(record), "utf-8")
            found = pretokenize(sample_shards, folder, tokenizer, 0.1)
        assert found == made


def test_token_shards_are_read_or_refused(tmp_path: Path) -> None:
    rng = random.Random(4)
    path = tmp_path / "train_a.npy"
    content = token_shard_bytes(torch.arange(500).numpy().astype("uint16"))
    header = content.index(b"\n")
    n_refused = 0
    for i in range(500):
        head = mutate_bytes(content[:header], rng) if i % 2 else content[:header]
        path.write_bytes(head + (content[header:] if i % 2 else mutate_bytes(content[header:], rng)))
        try:
            assert len(open_token_shard(path, "uint16", 500)) == 500
        except ValueError:
            n_refused += 1
    assert n_refused > 300


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizers", "tiktoken"])
def test_tokenizer_folders_are_read_or_refused(kind: str, tmp_path: Path) -> None:
    """In a process of its own, so that a crash of a library is seen and ends no other test."""
    line = [sys.executable, str(ROOT / "tests" / "mutations.py"), kind, str(tmp_path)]
    result = subprocess.run(line, env=environment() | IMPORTS, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    n_read, n_refused = map(int, result.stdout.split())
    assert n_refused > 20
    assert n_read + n_refused == 200


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    config = GPTConfig(tokenizer.vocab_size, context_length=8, emb_dim=8, n_layers=1, n_heads=2, arch="modern")
    model = GPTModel(config)
    state = {"step": 1, "val_loss": 2.0, "identity": {"model": vars(config)}}
    folder = tmp_path_factory.mktemp("run")
    return checkpoints.save_checkpoint(folder, state, model.state_dict(), {"x": torch.zeros(3)}, tokenizer.files())


def test_checkpoints_are_read_or_refused(checkpoint: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    rng = random.Random(6)
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    state = json.loads((folder / checkpoints.STATE_FILE).read_text("utf-8"))
    weights = (folder / checkpoints.MODEL_FILE).read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.loads(weights[8 : 8 + length])
    files = [folder / checkpoints.STATE_FILE, folder / checkpoints.MODEL_FILE, folder / checkpoints.TRAINING_FILE]
    files += sorted((folder / "tokenizer").iterdir())

    def mutate() -> None:
        how = rng.randrange(3)
        (folder / checkpoints.STATE_FILE).write_text(
            json.dumps(mutate_json(state, rng) if how == 0 else state), "utf-8"
        )
        content = weights
        if how == 1:
            changed = json.dumps(mutate_json(header, rng)).encode()
            content = struct.pack("<Q", len(changed)) + changed + weights[8 + length :]
        elif how == 2:
            content = mutate_bytes(weights[: 8 + length], rng) + weights[8 + length :]
        (folder / checkpoints.MODEL_FILE).write_bytes(content)
        checkpoints.write_checksums(folder, files)

    def read() -> None:
        chosen = loading.choose_checkpoint(str(folder), "newest")
        model = loading.load_model(
            chosen, lambda dimensions: GPTModel(GPTConfig(**dimensions)), tokenizer.vocab_size, torch.device("cpu")
        )
        with torch.no_grad():
            model(torch.zeros(1, 1, dtype=torch.int64))

    assert min(count_outcomes(mutate, read, 600)) > 40


def test_a_damaged_run_folder_is_an_error_of_one_line(checkpoint: Path, tmp_path: Path) -> None:
    """One mutation of each file, by the real command."""
    rng = random.Random(7)
    for name in ("state.json", "SHA256SUMS", "model.safetensors"):
        folder = shutil.copytree(checkpoint, tmp_path / name / checkpoint.name)
        (folder / name).write_bytes(mutate_bytes((folder / name).read_bytes(), rng))
        result = call_command("inference.py", "--exp_dir", folder, "--prompt", "雨")
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
