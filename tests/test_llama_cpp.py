"""gguf.py's knowledge of which tokenizers llama.cpp reads as sentencepiece does: refused are those that it does not.

tests/data/llama_cpp holds small models and the ids that llama.cpp gave for LINES (null: it ended the process). Where
llama-cpp-python is installed, it is asked again. `python tests/test_llama_cpp.py` makes that folder anew.
"""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import ROOT, SAMPLE, SAMPLE_TOKENIZER
from random_models import KINDS, random_model

from gptkit.base.cli import UserError
from gptkit.interop import huggingface
from gptkit.interop.gguf import _add_tokenizer, refuse_unreadable, write_gguf
from gptkit.text.backends import SentencePieceBackend
from gptkit.text.tokenizer import Tokenizer, load_sentencepiece

FOLDER = ROOT / "tests" / "data" / "llama_cpp"
LINES = [
    "", " ", "雨が降っていた。", "　魑魅魍魎の跋扈する夜、彼は𠮟られた😀", "「ABC ａｂｃ」と、１２３……", "二行\n　ある。\n\n終わり", "  空白  が  多い  ",
    "</s><unk><pad><s><0x41><0xE3>", "……………………", "\t\r\u3000\x7f\x85\u2028", "か\u3099が Å Σ ß", "a<b>[印]</b>と[印]", "のののの", "[印] [印]あ", "Ａの夜",
]  # fmt: skip
# What the trainer is asked for, beside what dataset/train_tokenizer.py always does.
PLAIN = {
    "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False, "user_defined_symbols": ["\n"], "required_chars": "▁",
}  # fmt: skip
RULES = {"normalization_rule_tsv": "FF21\t41\nA\t20\n"}  # full-width A, newline
NO_BYTES = {"model_type": "unigram", "byte_fallback": False, "user_defined_symbols": []}
CASES: dict[str, dict[str, Any]] = {
    "bpe": {},
    "bpe with a space before the text": {"add_dummy_prefix": True, "user_defined_symbols": []},
    "bpe with a space before the text and a symbol": {"add_dummy_prefix": True, "user_defined_symbols": ["[印]"]},
    "bpe with a symbol": {"user_defined_symbols": ["\n", "[印]"]},
    "bpe without bytes": {"byte_fallback": False},
    "bpe that removes spaces": {"remove_extra_whitespaces": True},
    "bpe that normalizes": RULES,
    "bpe with the pieces of a special name": {"control_symbols": ["のの"]},
    "unigram": {"model_type": "unigram"},
    "unigram without bytes": {"model_type": "unigram", "byte_fallback": False},
    "unigram that adds and removes spaces and normalizes": NO_BYTES
    | {"add_dummy_prefix": True, "remove_extra_whitespaces": True}
    | RULES,
    "unigram that removes spaces": NO_BYTES | {"remove_extra_whitespaces": True},
    "unigram with a space before the text and a symbol": NO_BYTES
    | {"add_dummy_prefix": True, "user_defined_symbols": ["[印]"]},
}


def path_of(case: str) -> Path:
    return FOLDER / f"{case.replace(' ', '_')}.model"


def load_case(case: str) -> Tokenizer:
    return load_sentencepiece(str(SAMPLE_TOKENIZER if case == "sample" else path_of(case)))


def committed() -> dict[str, list[list[int]] | None]:
    found: dict[str, list[list[int]] | None] = json.loads((FOLDER / "ids.json").read_text("utf-8"))["ids"]
    return found


@pytest.mark.parametrize("case", [*CASES, "sample"])
def test_what_llama_cpp_reads_otherwise_is_refused_and_nothing_else(case: str, tmp_path: Path) -> None:
    tokenizer = load_case(case)
    if [tokenizer.encode(line) for line in LINES] == committed()[case]:
        refuse_unreadable(tokenizer)
        return
    with pytest.raises(UserError, match=r"--model_type bpe, or export this one with --format hf$"):
        refuse_unreadable(tokenizer)
    model = random_model(tokenizer.vocab_size, **KINDS["modern"])
    tensors, config = huggingface.to_hf(model.state_dict(), vars(model.config), tokenizer.end_of_text_id)
    with pytest.raises(UserError):
        write_gguf(tmp_path / "x.gguf", tensors, config, tokenizer, "f16")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_lower_cases_is_refused() -> None:
    backend = SentencePieceBackend((SAMPLE_TOKENIZER / "spiece.model").read_bytes())
    with pytest.raises(UserError, match="does not lower-case text"):
        refuse_unreadable(Tokenizer(backend, "x", "</s>", lower_case=True))


def test_llama_cpp_gives_the_committed_ids(tmp_path: Path) -> None:
    """Where llama-cpp-python is installed, which has to be compiled."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; its committed ids are tested above")
    assert {case: ids_of_llama_cpp(case, tmp_path) for case in (*CASES, "sample")} == committed()


def ids_of_llama_cpp(case: str, folder: Path) -> list[list[int]] | None:
    """Return llama.cpp's ids of LINES, by a GGUF file of the vocabulary alone; None where it ends the process."""
    file = folder / "vocabulary.gguf"
    write_vocabulary(file, load_case(case))
    result = subprocess.run(
        [sys.executable, "-c", READER, str(file)], input=json.dumps(LINES), capture_output=True, text=True
    )
    if result.returncode:
        assert "std::out_of_range" in result.stderr, result.stderr
        return None
    found: list[list[int]] = json.loads(result.stdout)
    return found


READER = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([llama.tokenize(line.encode(), add_bos=False) for line in json.load(sys.stdin)]))
"""


def write_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    """Write the vocabulary alone, also where llama.cpp reads it otherwise."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_vocab_size(tokenizer.vocab_size)
    _add_tokenizer(writer, tokenizer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def train_case(settings: dict[str, Any], folder: Path) -> bytes:
    """Train a model of a case on the sample of the repository."""
    settings = PLAIN | {"model_type": "bpe", "vocab_size": 420} | settings
    if "normalization_rule_tsv" in settings:
        del settings["normalization_rule_name"]
        rules = folder / "rules.tsv"
        rules.write_text(settings["normalization_rule_tsv"])
        settings["normalization_rule_tsv"] = str(rules)
    lines = [
        line for document in SAMPLE.read_text("utf-8").splitlines() for line in json.loads(document)["text"].split("\n")
    ]
    characters = sorted(set("".join(lines)), key=lambda c: (-"".join(lines).count(c), c))[:100]
    rare = {ord(c): "\n" for c in set("".join(lines)) - set(characters)}
    parts = [part for line in lines for part in line.translate(rare).split("\n") if part]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(parts), model_writer=model, unk_id=0, eos_id=1, pad_id=2, bos_id=-1,
        character_coverage=1.0, minloglevel=2, num_threads=1, **settings,
    )  # fmt: skip
    return model.getvalue()


if __name__ == "__main__":
    import tempfile

    import llama_cpp

    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as made:
            path_of(name).write_bytes(train_case(settings, Path(made)))
    ids = {}
    for name in (*CASES, "sample"):
        with tempfile.TemporaryDirectory() as made:
            ids[name] = ids_of_llama_cpp(name, Path(made))
    described = {"llama_cpp_python": llama_cpp.__version__, "lines": LINES, "ids": ids}
    (FOLDER / "ids.json").write_text(json.dumps(described, ensure_ascii=False) + "\n", encoding="utf-8")
