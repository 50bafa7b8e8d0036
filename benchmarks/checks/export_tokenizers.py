"""Check that our own tokenizers, unigram and BPE of three sizes, are exported exactly: transformers and llama.cpp read them.

Each is trained by dataset/train_tokenizer.py and exported with a small random model. transformers runs in an environment
with nothing else of ours: --python names its interpreter (by default this one). A GGUF file is refused, or, where
llama-cpp-python is installed here, its ids are compared too.

    python benchmarks/checks/export_tokenizers.py --jsonl_path SUBSET --heldout_path HELDOUT [--python FRESH/bin/python]
"""

import contextlib
import importlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import torch
from machine import log, read_texts, run, script, versions, write_result

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.paths import existing_path
from gptkit.interop import huggingface
from gptkit.interop.gguf import write_gguf
from gptkit.interop.tokenizer_export import NAMES, export_tokenizer
from gptkit.text.tokenizer import PROBE, Tokenizer, load_sentencepiece

SIZES = (1500, 3000, 8000)
N_DOCUMENTS = 20
# Reads a folder by transformers alone; the texts come as JSON on standard input.
THEIRS = """
import json, sys
from transformers import AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = {name: [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for name, texts in json.load(sys.stdin).items()}
print(json.dumps({"ids": ids, "inputs": sorted(tokenizer("x"))}))
"""


@dataclass(frozen=True, kw_only=True)
class ExportTokenizersConfig:
    """Check the exported forms of our own tokenizers."""

    jsonl_path: str = setting(help="the corpus: .jsonl or .jsonl.xz")
    heldout_path: str = setting(help="documents of other authors, in the same form")
    n_lines: int = setting(1000, "lines of each whose ids are compared", at_least=1)
    max_chars: int = setting(2_000_000, "characters to train on", at_least=1)
    python: str = setting(sys.executable, "of an environment with transformers alone")


def main(config: ExportTokenizersConfig) -> None:
    corpus, heldout = (
        existing_path(config.jsonl_path, "--jsonl_path"),
        existing_path(config.heldout_path, "--heldout_path"),
    )
    documents = {"subset": read_texts(corpus), "heldout": read_texts(heldout)}
    texts = {
        name: [line for document in found for line in document.split("\n") if line][: config.n_lines]
        for name, found in documents.items()
    }
    texts |= {"probe": [*PROBE.split("\n"), PROBE, *NAMES], "documents": documents["subset"][:N_DOCUMENTS]}
    result: dict[str, Any] = {"versions": versions("transformers", "tokenizers", "sentencepiece")}
    with contextlib.suppress(ImportError):
        result["versions"]["llama_cpp_python"] = importlib.import_module("llama_cpp").__version__
    goals: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        run(script("dataset/prepare_aozora_jsonl.py", jsonl_path=corpus, output_dir=folder / "001"))
        for model_type in ("unigram", "bpe"):
            for size in SIZES:
                name, output = f"{model_type} {size}", folder / f"{model_type}_{size}"
                run(script("dataset/train_tokenizer.py", data_dir=folder / "001", output_dir=output, vocab_size=size,
                           model_type=model_type, max_chars=config.max_chars))  # fmt: skip
                tokenizer = load_sentencepiece(str(output))
                ours = {key: [tokenizer.encode(text) for text in values] for key, values in texts.items()}
                result[name] = {
                    "transformers": count_different(
                        ours, by_transformers(tokenizer, output / "hf", texts, config.python)
                    ),
                    "llama_cpp": by_llama_cpp(tokenizer, output, texts, ours),
                }
                log(f"{name}: {result[name]}")
                goals[f"{name}: transformers' ids equal"] = not any(result[name]["transformers"].values())
                gguf = result[name]["llama_cpp"]
                is_equal = (
                    not any(gguf.values()) if isinstance(gguf, dict) else (model_type, gguf) == ("unigram", "refused")
                )
                goals[f"{name}: llama.cpp's ids equal, or refused"] = is_equal
    result["texts"] = {name: len(values) for name, values in texts.items()}
    write_result("export_tokenizers", result | {"goals": goals})


def count_different(ours: dict[str, list[list[int]]], theirs: dict[str, list[list[int]]]) -> dict[str, int]:
    """Return the number of texts with other ids, by the name of their source."""
    return {name: sum(a != b for a, b in zip(ids, theirs[name], strict=True)) for name, ids in ours.items()}


def by_transformers(
    tokenizer: Tokenizer, folder: Path, texts: dict[str, list[str]], python: str
) -> dict[str, list[list[int]]]:
    """Export the tokenizer and return the ids that AutoTokenizer of `python` gives."""
    folder.mkdir()
    for name, content in export_tokenizer(tokenizer, context_length=128).items():
        (folder / name).write_bytes(content)
    command = [python, "-c", THEIRS, str(folder)]
    result = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {python} could not read the folder\n{result.stderr}")
    found = json.loads(result.stdout)
    assert found["inputs"] == ["attention_mask", "input_ids"], found["inputs"]
    return found["ids"]


def by_llama_cpp(
    tokenizer: Tokenizer, folder: Path, texts: dict[str, list[str]], ours: dict[str, list[list[int]]]
) -> dict[str, int] | str:
    """Return the number of texts to which llama.cpp gives other ids, or "refused" or "not installed".

    Texts with "▁" are left out: llama.cpp reads it as a space, which the README says.
    """
    torch.manual_seed(0)
    model = GPTModel(
        GPTConfig(tokenizer.vocab_size, context_length=32, emb_dim=32, n_layers=1, n_heads=2, arch="modern")
    )
    tensors, config = huggingface.to_hf(model.state_dict(), vars(model.config), tokenizer.end_of_text_id)
    try:
        write_gguf(folder / "model.gguf", tensors, config, tokenizer, "f32")
        from llama_cpp import Llama
    except UserError as error:
        log(str(error))
        return "refused"
    except ImportError:
        return "not installed"
    llama = Llama(str(folder / "model.gguf"), vocab_only=True, verbose=False)
    return {
        name: sum(
            llama.tokenize(text.encode(), add_bos=False) != ids
            for text, ids in zip(values, ours[name], strict=True)
            if "▁" not in text
        )
        for name, values in texts.items()
    }


if __name__ == "__main__":
    run_command(ExportTokenizersConfig, main)
