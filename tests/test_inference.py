"""inference.py as a user runs it, also through a pipe and on a pseudo-terminal, with a model that recites a poem."""

import codecs
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import POEM_CONTEXT, ROOT, assert_user_error, call_command, command, environment

import demo
import inference
from gptkit.base.cli import UserError, parse
from gptkit.generation import cpu_linear, generate
from gptkit.generation.sampling import SamplingSettings


def infer(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    result = call_command("inference.py", "--exp_dir", folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def test_text_comes_through_a_pipe_as_it_is_generated(poem: tuple[Path, str]) -> None:
    """Each read gets complete characters, and the text comes in several."""
    infer_command = command(
        "inference.py", "--exp_dir", poem[0], "--prompt", "春", "--temperature", 0, "--max_new_tokens", 100
    )
    with subprocess.Popen(infer_command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        reads = list(iter(lambda: os.read(process.stdout.fileno(), 65536), b""))
        errors = process.stderr.read().decode()
    assert len(reads) > 3
    assert "".join(read.decode() for read in reads) == f"春{poem[1]}\n"  # each read is UTF-8 by itself
    speed = re.fullmatch(r"(\d+) tokens, [\d.]+ tokens/s", errors.splitlines()[-1])
    assert speed
    assert len(poem[1]) - 2 < int(speed[1]) < 2 * len(poem[1])


def test_samples_equal_single_texts_of_their_seeds(babble: Path) -> None:
    """Three texts come in two batches, one below the other; each equals the text that its seed gives alone."""
    flags = ("--prompt", "雨が", "--max_new_tokens", 30, "--top_p", 0.9, "--min_p", 0.01, "--repetition_penalty", 1.1)
    alone = [infer(babble, *flags, "--seed", seed).stdout for seed in (7, 8, 9)]
    assert len(set(alone)) == 3
    batched = infer(babble, *flags, "--seed", 7, "--num_samples", 3, "--batch_size", 2).stdout
    assert batched == "\n".join(f"―― {i} / 3 ――\n{text}" for i, text in enumerate(alone, 1))


def test_a_draft_is_made_for_single_texts_and_does_not_change_them(
    babble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("雨\n雪\n", "utf-8")
    common: dict[str, Any] = {"exp_dir": str(babble), "device": "cpu", "seed": 5, "max_new_tokens": 40}
    inference.main(inference.InferenceConfig(**common, prompt="雨が"))
    expected = capsys.readouterr().out
    monkeypatch.setattr(cpu_linear, "MIN_DRAFT_ENTRIES", 0)  # as if the model were large
    with mock.patch.object(generate, "speculate", wraps=generate.speculate) as speculating:
        inference.main(inference.InferenceConfig(**common, prompt="雨が"))
    assert speculating.call_count == 1
    assert capsys.readouterr().out == expected
    many = str(tmp_path / "prompts.txt")
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"prompt": "雨が"}, True),
        ({"interactive": True}, True),
        ({"prompts_file": many, "batch_size": 1}, True),
        ({"prompts_file": many}, False),
        ({"prompt": "雨が", "num_samples": 2}, False),
        ({"prompt": "雨が", "quantize": "int8"}, False),
        ({"prompt": "雨が", "dtype": "bfloat16"}, False),
        ({"prompt": "雨が", "dtype": "float16"}, False),
    ]
    for options, expects_draft in cases:
        text_generator = inference.load_generator(inference.InferenceConfig(**common, **options))
        assert (text_generator.draft is not None) == expects_draft, options


def test_many_prompts_give_json_lines(poem: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("春\n\n雪\n花\n", "utf-8")
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ("春", "雪", "花")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    results = [
        infer(poem[0], "--prompts_file", tmp_path / name, "--seed", 3, "--temperature", 0.01, "--stop", "月", "\n")
        for name in ("prompts.txt", "prompts.jsonl")
    ]
    assert results[0].stdout == results[1].stdout
    objects = [json.loads(line) for line in results[0].stdout.splitlines()]
    assert [line["prompt"] for line in objects] == ["春", "雪", "花"]
    first = poem[1].partition("\n")[0]
    assert objects[0] == {"prompt": "春", "text": first, "seed": 3, "tokens": objects[0]["tokens"], "finish": "stop"}
    assert objects[2]["text"] == first.partition("花")[2]
    assert "3 of 3 texts" in results[0].stderr


def test_a_prompt_from_standard_input_and_one_that_is_too_long(
    poem: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("雨\n\n春\n".encode()), "utf-8"))
    result = infer(poem[0], "--prompt", "-", "--temperature", 0)
    assert result.stdout == f"雨\n\n春{poem[1]}\n"
    assert "past that it continues from the last half" in result.stderr
    long = infer(poem[0], "--prompt", "雨が降る。" * 100 + "春", "--temperature", 0)
    assert long.stdout == f"{'雨が降る。' * 100}春{poem[1]}\n"
    assert re.search(
        rf"note: the prompt is \d+ tokens and the model sees {POEM_CONTEXT}; it reads the last \d\d\n", long.stderr
    )


@pytest.mark.parametrize(
    "flag",
    [("--quantize", "int8"), ("--dtype", "bfloat16"), ("--dtype", "float16"), ("--checkpoint", "best")],
    ids=str,
)
def test_other_weights_generate_the_same(poem: tuple[Path, str], flag: tuple[str, str]) -> None:
    result = infer(poem[0], "--prompt", "春", "--temperature", 0, *flag)
    assert result.stdout == f"春{poem[1]}\n"
    assert flag[1] in result.stderr or flag[1] == "best"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ["--prompt", "--prompts_file", "--interactive"]),
        (("--prompt", "雨", "--interactive"), ["give one of"]),
        (("--prompt", "雨", "--top_p", "0"), ["--top_p 0.0", "more than 0"]),
        (("--prompt", "雨", "--top_p", "1.1"), ["--top_p 1.1", "at most 1"]),
        (("--prompt", "雨", "--min_p", "-0.1"), ["--min_p -0.1", "at least 0"]),
        (("--prompt", "雨", "--repetition_penalty", "0"), ["--repetition_penalty 0.0", "more than 0"]),
        (("--prompt", "雨", "--num_samples", "0"), ["--num_samples 0", "at least 1"]),
        (("--prompt", "雨", "--temperature", "nan"), ["--temperature nan"]),
        (("--prompt", "雨", "--quantize", "int8", "--dtype", "bfloat16"), ["--quantize int8"]),
        (("--prompts_file", "nowhere.txt"), ["--prompts_file nowhere.txt"]),
        (("--prompts_file", "README.md/x"), ["README.md/x"]),
        (("--prompts_file", "tests"), ["--prompts_file tests"]),
        (("--prompts_file", ""), ["--prompts_file is empty"]),
    ],
    ids=str,
)
def test_user_errors(
    poem: tuple[Path, str], arguments: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        inference.main(parse(inference.InferenceConfig, ["--exp_dir", str(poem[0]), *arguments]))
    for word in words:
        assert word in str(error.value)


def test_a_user_error_of_the_command(poem: tuple[Path, str]) -> None:
    assert_user_error(call_command("inference.py", "--exp_dir", poem[0], "--prompt", "雨", "--top_p", 2), "--top_p 2.0")


@pytest.mark.parametrize("content", ["", "\n \n", '{"prompt": 1}', '["雨"]', "{"], ids=repr)
def test_prompts_files_without_a_prompt(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        inference.read_prompts(path)


def test_an_empty_prompt_begins_a_work(poem: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model sees end-of-text alone; from standard input, from a file of prompts and on the page of demo.py, too."""
    text = infer(poem[0], "--prompt", "", "--temperature", 0, "--max_new_tokens", 8).stdout
    assert len(text) > 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), "utf-8"))
    assert infer(poem[0], "--prompt", "-", "--temperature", 0, "--max_new_tokens", 8).stdout == text
    (tmp_path / "a.jsonl").write_text('{"prompt": ""}\n')
    flags = ("--prompts_file", tmp_path / "a.jsonl", "--temperature", 0, "--max_new_tokens", 8)
    line = json.loads(infer(poem[0], *flags).stdout)
    assert (line["prompt"], line["text"]) == ("", text.removesuffix("\n"))
    generator = inference.load_generator(inference.InferenceConfig(exp_dir=str(poem[0]), device="cpu", prompt=""))
    ids = generator.new_text("", inference.GenerationSettings(), 0).prompt
    assert ids == [generator.tokenizer.end_of_text_id]
    (folder,) = demo.find_folders([str(poem[0])]).values()
    loaded = demo.load_model(folder, torch.device("cpu"))
    assert len(list(demo.growing_text(loaded, "", SamplingSettings(), 8, 5))[-1]) > 2


class Unreadable(io.StringIO):
    """Standard input as nohup leaves it."""

    def readline(self, *_: Any) -> str:
        raise OSError(9, "Bad file descriptor")

    read = readline


@pytest.mark.parametrize("flags", [("--interactive",), ("--prompt", "-")], ids=str)
@pytest.mark.parametrize("stdin", [None, io.StringIO(), Unreadable()], ids=["closed", "empty", "unreadable"])
def test_standard_input_without_a_text(
    poem: tuple[Path, str], flags: tuple[str, ...], stdin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    result = call_command("inference.py", "--exp_dir", poem[0], "--max_new_tokens", 3, *flags)
    if isinstance(stdin, Unreadable) or stdin is None or flags[0] == "--interactive":
        assert_user_error(result, " ".join(flags), "standard input")
    else:
        assert result.returncode == 0, result.stderr


def test_interactive_with_standard_input_closed(poem: tuple[Path, str]) -> None:
    interactive = command("inference.py", "--exp_dir", poem[0], "--interactive")
    line = f"{' '.join(map(shlex.quote, interactive))} <&-"
    result = subprocess.run(["bash", "-c", line], env=environment(), capture_output=True, encoding="utf-8")
    assert_user_error(result, "--interactive", "closed")
    assert result.stderr.count("\n") == 1


def test_what_generation_does_not_read_may_be_missing(
    poem: tuple[Path, str], tmp_path: Path, sample_texts: list[str]
) -> None:
    copy = Path(shutil.copytree(poem[0], tmp_path / "exp"))
    (path,) = copy.glob("model_checkpoints/step_*/training.safetensors")
    path.unlink()
    assert infer(copy, "--prompt", "春", "--temperature", 0).stdout == f"春{poem[1]}\n"
    (tmp_path / "a.txt").write_text(sample_texts[0], "utf-8")
    for arguments in (
        ("evaluate_model.py", "--exp_dir", copy, "--text_path", tmp_path / "a.txt"),
        ("export_hf.py", "--exp_dir", copy, "--output_dir", tmp_path / "hf"),
    ):
        result = call_command(*arguments)
        assert result.returncode == 0, result.stderr


class Terminal:
    """A process on a pseudo-terminal, and its output so far."""

    def __init__(self, arguments: list[str], may_be_broken: bool = False) -> None:
        self.may_be_broken = may_be_broken
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell makes jobs in the background ignore it
            os.environ.update(environment() | {"TERM": "dumb", "LC_ALL": "C.UTF-8"})
            os.execv(arguments[0], arguments)
        self.output = b""

    def read(self, timeout_s: float) -> bool:
        """Return whether more came.

        It must be UTF-8, but for its last bytes: the terminal echoes what is typed byte by byte.
        """
        if not select.select([self.terminal], [], [], timeout_s)[0]:
            return False
        try:
            new = os.read(self.terminal, 65536)
        except OSError:  # its other end is closed
            return False
        self.output += new
        assert self.may_be_broken or "\ufffd" not in self.text()
        return bool(new)

    def text(self) -> str:
        errors = "replace" if self.may_be_broken else "strict"  # at Ctrl-C a terminal drops its buffer
        return codecs.getincrementaldecoder("utf-8")(errors).decode(self.output)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Wait until `text` is shown after the first `after` characters; return the position of its end."""
        deadline = time.monotonic() + 60
        while text not in self.text()[after:]:
            assert time.monotonic() < deadline, self.text()
            self.read(1)
        return self.text().index(text, after) + len(text)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> int:
        """Read to the end of the output; return the exit code."""
        while self.read(20):
            pass
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def open_terminal() -> Iterator[Callable[..., Terminal]]:
    """Yield a function that opens terminals; at the end, kill what still runs in them."""
    terminals: list[Terminal] = []

    def open_one(*arguments: object, may_be_broken: bool = False) -> Terminal:
        terminals.append(Terminal(command("inference.py", *arguments), may_be_broken))
        return terminals[-1]

    yield open_one
    for terminal in terminals:
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_interactive_on_a_terminal(poem: tuple[Path, str], open_terminal: Callable[..., Terminal]) -> None:
    """Type a beginning, continue it, change a setting and the beginning; no character comes broken."""
    terminal = open_terminal("--exp_dir", poem[0], "--interactive", "--temperature", 0, "--max_new_tokens", 6)
    recited = poem[1]
    at = terminal.wait_for("> ")
    assert "/set" in terminal.text()
    terminal.type("\n")
    at = terminal.wait_for("まだ文章がありません", at)
    terminal.type("春\n")
    at = terminal.wait_for("tokens/s", at)
    for _ in range(3):  # to the poem's end
        terminal.type("\n")
        at = terminal.wait_for("tokens/s", at)
    terminal.type("/text\n")
    at = terminal.wait_for(f"春{recited.replace(chr(10), chr(13) + chr(10))}", at)
    for typed, answer in (
        ("/set top_p 3", "at most 1"), ("/set top_p none", "> "), ("/set warmth 3", "there is no setting warmth"),
        ("/set max_new_tokens 200", "> "), ("/settings", "max_new_tokens 200"), ("/nonsense", "/nonsense"),
    ):  # fmt: skip
        terminal.type(f"{typed}\n")
        at = terminal.wait_for(answer, terminal.wait_for(typed, at))
    terminal.type("/edit\n")
    terminal.wait_for("> 春", at)
    terminal.type("\b雨春\n")
    at = terminal.wait_for(f"雨春{recited}".replace("\n", "\r\n"), at)
    terminal.type("/again\n")
    at = terminal.wait_for(f"雨春{recited}".replace("\n", "\r\n"), at)
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_text_and_not_the_session(babble: Path, open_terminal: Callable[..., Terminal]) -> None:
    arguments = ("--exp_dir", babble, "--interactive", "--top_k", 1, "--max_new_tokens", 1_000_000)
    terminal = open_terminal(*arguments, may_be_broken=True)
    at = terminal.wait_for("> ")
    terminal.type("雨\n")
    at = terminal.wait_for("continues from the last half", at)
    time.sleep(1)
    terminal.type("\x03")
    terminal.wait_for("tokens/s", at)
    terminal.wait_for("\r\n> ", at)
    terminal.type("\x04")
    assert terminal.end() == 0
