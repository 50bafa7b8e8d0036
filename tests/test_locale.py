"""Commands in a locale that knows only ASCII (LC_ALL=C): text that is UTF-8 arrives, and paths can be used."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import SAMPLE_TOKENS, TINY_MODEL, command, environment, write_jsonl

from gptkit.base.cli import parse, setting, utf8_text
from gptkit.base.files import read_json, write_json

JAPANESE = "春の夜の、"
UNDECODED = JAPANESE.encode().decode("ascii", "surrogateescape")  # as Python passes it in such a locale


def run(folder: Path, *arguments: object, text: str | None = None) -> subprocess.CompletedProcess:
    ascii_only = environment() | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    result = subprocess.run(
        command(*arguments), env=ascii_only, cwd=folder, capture_output=True, encoding="utf-8", input=text
    )
    assert result.returncode == 0, result.stderr
    return result


@dataclass(frozen=True)
class Toy:
    """A toy."""

    text: str = setting("", "text", is_text=True)
    texts: tuple[str, ...] = setting((), "texts", is_text=True)
    path: str | None = setting(None, "a path")


def test_text_is_decoded_and_a_path_is_not() -> None:
    given = parse(Toy, ["--text", UNDECODED, "--texts", UNDECODED, "雨", "--path", UNDECODED])
    assert given == Toy(JAPANESE, (JAPANESE, "雨"), UNDECODED)
    assert utf8_text("\udcff\udcfe") == "\udcff\udcfe"  # no UTF-8: whoever uses it says so
    assert utf8_text("雨\ud800") == "雨\ud800"


@pytest.mark.parametrize(("value", "read"), [(UNDECODED, JAPANESE), (JAPANESE, JAPANESE), ("\udcff", "?")], ids=ascii)
def test_json_files_are_utf8_whatever_a_path_holds(tmp_path: Path, value: str, read: str) -> None:
    write_json(tmp_path / "a.json", {"path": value})
    assert read_json(tmp_path / "a.json") == {"path": read}


def test_a_prompt_is_read_from_the_command_line_and_from_standard_input(poem: tuple[Path, str], tmp_path: Path) -> None:
    infer = ("inference.py", "--exp_dir", poem[0], "--temperature", 0, "--max_new_tokens", 12)
    shown = run(tmp_path, *infer, "--prompt", "春", "--stop", "月").stdout
    assert "春" in shown
    assert "月" not in shown
    assert run(tmp_path, *infer, "--prompt", "-", text="春\n").stdout.startswith(f"春{poem[1][:1]}")
    assert "春" in run(tmp_path, *infer, "--interactive", text="春\n").stdout


@pytest.mark.slow
def test_a_run_with_japanese_paths(tmp_path: Path, sample_texts: list[str]) -> None:
    write_jsonl(tmp_path / "本.jsonl", sample_texts[:13], 姓名="夏目漱石")
    prepare = ("dataset/prepare_aozora_jsonl.py", "--jsonl_path", "本.jsonl", "--output_dir", "本文")
    run(tmp_path, *prepare, "--author", "夏目漱石", "--separator", "※※")
    manifest = json.loads((tmp_path / "本文" / "manifest.json").read_bytes())
    assert (manifest["separator"], manifest["works"], manifest["source"]["file"]) == ("※※", 13, "本.jsonl")
    output = ("--output_dir", "実験/出力", "--start_context", "春の", "--print_sample_iter", 2)
    train = ("pretraining.py", *SAMPLE_TOKENS, *TINY_MODEL, "--data_dir", "本文", "--device", "cpu", *output)
    for n_steps in (2, 4):
        result = run(tmp_path, *train, "--max_steps", n_steps)
    assert "resuming from" in result.stdout
    run_folder = tmp_path / "実験" / "出力"
    assert json.loads((run_folder / "config.json").read_bytes())["settings"]["output_dir"] == "実験/出力"
    samples = (run_folder / "samples.jsonl").read_text("utf-8").splitlines()
    assert json.loads(samples[0])["text"].startswith("春の")
    run(tmp_path, "inference.py", "--exp_dir", "実験", "--prompt", "春", "--max_new_tokens", 2)
    run(tmp_path, "report.py", "--exp_dir", "実験", "--output", "報告.html")
    assert "<title>出力" in (tmp_path / "報告.html").read_text("utf-8")


def test_standard_input_keeps_a_locale_that_is_not_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptkit.generation.prompts import prepare_standard_input, read_standard_input

    for encoding in ("ascii", "utf-8", "euc_jp"):
        content = "春\n".encode("euc_jp" if encoding == "euc_jp" else "utf-8")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding))
        prepare_standard_input("--prompt -")
        assert read_standard_input("--prompt -") == "春"
