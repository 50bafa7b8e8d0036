"""inference.py as a user meets it: real processes, pipes and a pseudo-terminal, with a model that recites a poem."""

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import POEM_CONTEXT, ROOT, assert_user_error, command, environment, run_command

import inference
from gptkit.base.cli import UserError, parse
from gptkit.generation import cpu_linear, generate


def infer(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    result = run_command("inference.py", "--exp_dir", folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result


def test_text_comes_through_a_pipe_as_it_is_written(poem: tuple[Path, str], tmp_path: Path) -> None:
    """Each write is of whole characters; the first is there long before the last."""
    line = command("inference.py", "--exp_dir", poem[0], "--prompt", "春", "--temperature", 0, "--max_new_tokens", 100)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout
        reads = list(iter(lambda: os.read(process.stdout.fileno(), 65536), b""))
        errors = process.stderr.read().decode()
    assert len(reads) > 3
    assert "".join(read.decode() for read in reads) == f"春{poem[1]}\n"  # each read is UTF-8 by itself
    speed = re.fullmatch(r"(\d+) tokens, [\d.]+ tokens/s", errors.splitlines()[-1])
    assert speed
    assert len(poem[1]) - 2 < int(speed[1]) < 2 * len(poem[1])


def test_samples_are_those_of_their_seeds(babble: Path) -> None:
    """Three texts at once, in two batches, one below the other: each is what its seed gives alone."""
    how = ("--prompt", "雨が", "--max_new_tokens", 30, "--top_p", 0.9, "--min_p", 0.01, "--repetition_penalty", 1.1)
    alone = [infer(babble, *how, "--seed", seed).stdout for seed in (7, 8, 9)]
    assert len(set(alone)) == 3
    together = infer(babble, *how, "--seed", 7, "--num_samples", 3, "--batch_size", 2).stdout
    assert together == "\n".join(f"―― {i} / 3 ――\n{text}" for i, text in enumerate(alone, 1))


def test_a_draft_is_made_for_texts_alone_and_changes_nothing(
    babble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("雨\n雪\n", "utf-8")
    how = {"exp_dir": str(babble), "device": "cpu", "seed": 5, "max_new_tokens": 40}
    inference.main(inference.InferenceConfig(**how, prompt="雨が"))
    expected = capsys.readouterr().out
    monkeypatch.setattr(cpu_linear, "DRAFT_FROM", 0)  # as if the model were large
    with mock.patch.object(generate, "guess_ahead", wraps=generate.speculate) as guessing:
        inference.main(inference.InferenceConfig(**how, prompt="雨が"))
    assert guessing.call_count == 1
    assert capsys.readouterr().out == expected
    many = str(tmp_path / "prompts.txt")
    ways: list[tuple[dict[str, Any], bool]] = [
        ({"prompt": "雨が"}, True),
        ({"interactive": True}, True),
        ({"prompts_file": many, "batch_size": 1}, True),
        ({"prompts_file": many}, False),
        ({"prompt": "雨が", "num_samples": 2}, False),
        ({"prompt": "雨が", "quantize": "int8"}, False),
        ({"prompt": "雨が", "dtype": "bfloat16"}, False),
    ]
    for way, expects_draft in ways:
        writer = inference.load_generator(inference.InferenceConfig(**how, **way))
        assert (writer.draft is not None) == expects_draft, way


def test_many_prompts_into_json_lines(poem: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("春\n\n雪\n花\n", "utf-8")
    lines = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in ("春", "雪", "花")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines), "utf-8")
    results = [
        infer(poem[0], "--prompts_file", tmp_path / name, "--seed", 3, "--temperature", 0.01, "--stop", "月", "\n")
        for name in ("prompts.txt", "prompts.jsonl")
    ]
    assert results[0].stdout == results[1].stdout
    written = [json.loads(line) for line in results[0].stdout.splitlines()]
    assert [line["prompt"] for line in written] == ["春", "雪", "花"]
    first = poem[1].partition("\n")[0]
    assert written[0] == {"prompt": "春", "text": first, "seed": 3, "tokens": written[0]["tokens"], "finish": "stop"}
    assert written[2]["text"] == first.partition("花")[2]
    assert "3 of 3 texts" in results[0].stderr


def test_a_prompt_from_standard_input_and_one_that_is_too_long(poem: tuple[Path, str]) -> None:
    line = command("inference.py", "--exp_dir", poem[0], "--prompt", "-", "--temperature", 0)
    result = subprocess.run(line, input="雨\n\n春\n", capture_output=True, encoding="utf-8", env=environment())
    assert result.stdout == f"雨\n\n春{poem[1]}\n"
    assert "past that it goes on from the last half" in result.stderr
    long = infer(poem[0], "--prompt", "雨が降る。" * 100 + "春", "--temperature", 0)
    assert long.stdout == f"{'雨が降る。' * 100}春{poem[1]}\n"
    assert re.search(
        rf"note: the prompt is \d+ tokens and the model sees {POEM_CONTEXT}; it reads the last \d\d\n", long.stderr
    )


@pytest.mark.parametrize("how", [("--quantize", "int8"), ("--dtype", "bfloat16"), ("--checkpoint", "best")], ids=str)
def test_other_weights_say_the_same(poem: tuple[Path, str], how: tuple[str, str]) -> None:
    result = infer(poem[0], "--prompt", "春", "--temperature", 0, *how)
    assert result.stdout == f"春{poem[1]}\n"
    assert how[1] in result.stderr or how[1] == "best"


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
    ],
    ids=str,
)
def test_mistakes(
    poem: tuple[Path, str], arguments: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        inference.main(parse(inference.InferenceConfig, ["--exp_dir", str(poem[0]), *arguments]))
    for word in words:
        assert word in str(error.value)


def test_a_mistake_by_the_real_command(poem: tuple[Path, str]) -> None:
    assert_user_error(run_command("inference.py", "--exp_dir", poem[0], "--prompt", "雨", "--top_p", 2), "--top_p 2.0")


@pytest.mark.parametrize("content", ["", "\n \n", '{"prompt": 1}', '["雨"]', "{"], ids=repr)
def test_prompts_files_that_hold_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        inference.read_prompts(path)


class Terminal:
    """A process on a pseudo-terminal, and all that it has shown."""

    def __init__(self, line: list[str], may_be_broken: bool = False) -> None:
        self.may_be_broken = may_be_broken
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell has jobs in its background ignore it
            os.environ.update(environment() | {"TERM": "dumb", "LC_ALL": "C.UTF-8"})
            os.execv(line[0], line)
        self.shown = b""

    def read(self, timeout_s: float) -> bool:
        """Whether more came, which must be UTF-8 (but for its last bytes: the terminal echoes what is typed byte by byte)."""
        if not select.select([self.terminal], [], [], timeout_s)[0]:
            return False
        try:
            new = os.read(self.terminal, 65536)
        except OSError:  # its other end is closed
            return False
        self.shown += new
        assert self.may_be_broken or "\ufffd" not in self.text()
        return bool(new)

    def text(self) -> str:
        errors = "replace" if self.may_be_broken else "strict"  # at Ctrl-C a terminal throws away what it holds
        return codecs.getincrementaldecoder("utf-8")(errors).decode(self.shown)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Until `text` is shown, beyond the first `after` characters; where it ends."""
        deadline = time.monotonic() + 60
        while text not in self.text()[after:]:
            assert time.monotonic() < deadline, self.text()
            self.read(1)
        return self.text().index(text, after) + len(text)

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def end(self) -> int:
        """Read to the end; the exit code."""
        while self.read(20):
            pass
        os.close(self.terminal)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def opened() -> Iterator[Callable[..., Terminal]]:
    """Opens terminals, and ends what still runs in them."""
    terminals: list[Terminal] = []

    def open_terminal(*arguments: object, may_be_broken: bool = False) -> Terminal:
        terminals.append(Terminal(command("inference.py", *arguments), may_be_broken))
        return terminals[-1]

    yield open_terminal
    for terminal in terminals:
        try:
            os.kill(terminal.pid, signal.SIGKILL)
            os.waitpid(terminal.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def test_writing_in_turns_on_a_terminal(poem: tuple[Path, str], opened: Callable[..., Terminal]) -> None:
    """A beginning, more, a setting, the beginning changed, and no character that is not whole."""
    terminal = opened("--exp_dir", poem[0], "--interactive", "--temperature", 0, "--max_new_tokens", 6)
    said = poem[1]
    at = terminal.wait_for("> ")
    assert "/set" in terminal.text()
    terminal.type("\n")
    at = terminal.wait_for("まだ文章がありません", at)
    terminal.type("春\n")
    at = terminal.wait_for("tokens/s", at)
    for _ in range(3):  # more, to the poem's end
        terminal.type("\n")
        at = terminal.wait_for("tokens/s", at)
    terminal.type("/text\n")
    at = terminal.wait_for(f"春{said.replace(chr(10), chr(13) + chr(10))}", at)
    for typed, answer in (
        ("/set top_p 3", "at most 1"), ("/set top_p none", "> "), ("/set warmth 3", "there is no setting warmth"),
        ("/set max_new_tokens 200", "> "), ("/settings", "max_new_tokens 200"), ("/nonsense", "/nonsense"),
    ):  # fmt: skip
        terminal.type(f"{typed}\n")
        at = terminal.wait_for(answer, terminal.wait_for(typed, at))
    terminal.type("/edit\n")
    terminal.wait_for("> 春", at)
    terminal.type("\b雨春\n")
    at = terminal.wait_for(f"雨春{said}".replace("\n", "\r\n"), at)
    terminal.type("/again\n")
    at = terminal.wait_for(f"雨春{said}".replace("\n", "\r\n"), at)
    terminal.type("/quit\n")
    assert terminal.end() == 0


def test_ctrl_c_stops_the_text_and_not_the_session(babble: Path, opened: Callable[..., Terminal]) -> None:
    arguments = ("--exp_dir", babble, "--interactive", "--top_k", 1, "--max_new_tokens", 1_000_000)
    terminal = opened(*arguments, may_be_broken=True)
    at = terminal.wait_for("> ")
    terminal.type("雨\n")
    at = terminal.wait_for("goes on from the last half", at)
    time.sleep(1)
    terminal.type("\x03")
    terminal.wait_for("tokens/s", at)
    terminal.wait_for("\r\n> ", at)
    terminal.type("\x04")
    assert terminal.end() == 0
