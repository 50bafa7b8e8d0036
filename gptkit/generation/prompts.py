"""Read prompts: from a file, or from standard input. How they are encoded is left to text/tokenizer.py."""

import codecs
import io
import json
import sys
from pathlib import Path

from gptkit.base.cli import UserError


def prepare_standard_input(flag: str) -> None:
    """Let standard input be read as UTF-8 in an ASCII locale, and any bytes pass: encode_prompt reports those it cannot use.

    Raises UserError, with the flag that needs it, where it is closed.
    """
    if sys.stdin is None:
        raise UserError(f"{flag} reads standard input, which is closed; run it in a terminal, or pipe a text into it")
    if isinstance(sys.stdin, io.TextIOWrapper):
        is_ascii = codecs.lookup(sys.stdin.encoding).name == "ascii"
        sys.stdin.reconfigure(encoding="utf-8" if is_ascii else None, errors="surrogateescape")


def read_standard_input(flag: str) -> str:
    """Return the text on standard input, without the newline at its end. Raises UserError."""
    try:
        return sys.stdin.read().removesuffix("\n")
    except OSError as error:  # under nohup it can only be written to
        raise UserError(f"{flag} reads standard input, which cannot be read ({error}); pipe a text into it")


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a .jsonl file, or of any other the lines. Raises UserError where there are none."""
    try:
        lines = [line.removesuffix("\r") for line in path.read_text("utf-8-sig").split("\n")]  # a text may hold U+2028
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"--prompts_file {path}: no UTF-8 text ({error}); name a .txt or .jsonl file")
    if path.name.lower().endswith(".jsonl"):
        prompts = [_parse_prompt(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file {path} holds no prompt; put one on each line")
    return prompts


def _parse_prompt(path: Path, number: int, line: str) -> str:
    """Return the prompt of a line of JSON. Raises UserError where it has none."""
    try:
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str):
            return prompt
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f'--prompts_file {path}: line {number}: give an object such as {{"prompt": "雨が"}}')
