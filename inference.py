"""Write with a trained GPT: an experiment folder and a prompt in, text out as it is written.

    python inference.py --exp_dir exp001 --prompt "吾輩は猫である。名前は" --max_new_tokens 200
    python inference.py --exp_dir exp001 --interactive
    python inference.py --exp_dir exp001 --prompts_file prompts.txt > texts.jsonl

Needs the checkpoint alone: no network, no dataset. All but the text goes to standard error.
"""

import codecs
import dataclasses
import io
import json
import random
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gpt_model import GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, progress_bar, replace_setting, run_command, setting
from gptkit.base.paths import existing_path
from gptkit.generation.cpu_linear import Int8Linear, prepare_for_generation, replace_linear_layers
from gptkit.generation.generate import Decode, TextStream, compiled_decode, decode_one_token, stream_text, window_start
from gptkit.generation.sampling import SamplingSettings
from gptkit.text.tokenizer import Tokenizer, encode_prompt
from gptkit.training import checkpoints

MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SamplingSettings):
    """What may change from text to text."""

    max_new_tokens: int = setting(200, "most tokens to write", at_least=1, at_most=1_000_000)
    seed: int | None = setting(
        None, "the same seed gives the same text (default: another text each time)", at_least=0, at_most=MAX_SEED
    )
    stop: tuple[str, ...] = setting((), "end before one of these texts")


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(GenerationSettings):
    """Write with a trained GPT."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)")
    prompt: str | None = setting(None, "how the text begins; - reads it from standard input")
    prompts_file: str | None = setting(
        None, "many beginnings, one a line of a .txt file or the prompt of each line of a .jsonl file; JSONL comes out"
    )
    interactive: bool = setting(False, "write in turns: a beginning, a text, the next beginning or how to go on")
    num_samples: int = setting(1, "texts for each prompt; the i-th has the seed + i - 1", at_least=1, at_most=1024)
    batch_size: int = setting(8, "texts written at once", at_least=1, at_most=1024)
    checkpoint: checkpoints.Choice = setting("newest", "best: the one with the lowest validation loss")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto", "of the weights (auto: bfloat16 on GPUs that multiply it)"
    )
    quantize: Literal["none", "int8"] = setting("none", "int8: weights in 8 bits, quicker on a CPU")
    compile: bool | None = setting(None, "torch.compile a token's work (default: for 500 tokens or more on CUDA)")


@dataclass(frozen=True)
class TextGenerator:
    """A model that is ready to write."""

    model: GPTModel
    tokenizer: Tokenizer
    decode: Decode
    draft: GPTModel | None

    def begin(self, prompt: str, settings: GenerationSettings, seed: int, number: int = 0) -> TextStream:
        """Raises UserError where the prompt is none for the tokenizer."""
        return TextStream(
            self.tokenizer, encode_prompt(self.tokenizer, prompt), (seed + number) % MAX_SEED, settings.stop
        )

    def write(self, texts: list[TextStream], settings: GenerationSettings) -> Generator[tuple[int, str], None, None]:
        context_length = self.model.config.context_length
        return stream_text(
            self.model, texts, settings, settings.max_new_tokens, context_length, self.decode, self.draft
        )


def main(config: InferenceConfig) -> None:
    ways = [config.prompt is not None, config.prompts_file is not None, config.interactive]
    if sum(ways) != 1:
        raise UserError("give one of --prompt, --prompts_file and --interactive")
    prompts = read_prompts(existing_path(config.prompts_file, "--prompts_file")) if config.prompts_file else []
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is told with the prompt
    writer = load_generator(config)
    seed = random.SystemRandom().randrange(2**32) if config.seed is None else config.seed
    if config.interactive:
        converse(writer, config, seed)
    elif config.prompts_file is not None:
        write_many(writer, config, prompts, seed)
    else:
        prompt = read_stdin() if config.prompt == "-" else config.prompt or ""
        write_prompt(writer, config, prompt, seed)


def read_stdin() -> str:
    """Raises UserError."""
    if sys.stdin is None:
        raise UserError("--prompt - reads standard input, which is closed; pipe a text into it")
    return sys.stdin.read().removesuffix("\n")


def load_generator(config: InferenceConfig) -> TextGenerator:
    device = devices.choose_device(config.device)
    if config.quantize == "int8" and (device.type != "cpu" or config.dtype == "bfloat16"):
        raise UserError(
            "--quantize int8 is for the CPU, and without --dtype bfloat16; add --device cpu, or leave it out"
        )
    if config.quantize == "int8" and config.compile:
        raise UserError("--quantize int8 cannot be compiled; leave --compile out")
    folder = checkpoints.choose_checkpoint(config.exp_dir, config.checkpoint)
    model, tokenizer = checkpoints.load_checkpoint(folder, GPTModel.from_dimensions, device)
    dtype = devices.choose_dtype(config.dtype, device)
    model = model.to(dtype).eval()
    kind = "int8" if config.quantize == "int8" else str(dtype).removeprefix("torch.")
    about = f"{model.n_parameters():,} parameters on {devices.describe_device(device)}, {kind}"
    print(f"{folder}: {about}", file=sys.stderr)
    compile = config.compile
    if compile is None:
        compile = device.type == "cuda" and config.max_new_tokens >= 500
    draft = None
    if config.quantize == "int8":
        replace_linear_layers(model, Int8Linear)
    elif device.type == "cpu" and dtype == torch.float32 and not compile:
        alone = config.interactive or config.batch_size == 1 or (config.num_samples == 1 and not config.prompts_file)
        draft = prepare_for_generation(model, with_draft=alone)
    return TextGenerator(model, tokenizer, compiled_decode() if compile else decode_one_token, draft)


def write_prompt(writer: TextGenerator, config: InferenceConfig, prompt: str, seed: int) -> None:
    """One prompt's texts on standard output, as they are written, one below the other."""
    texts = [writer.begin(prompt, config, seed, number) for number in range(config.num_samples)]
    warn_about_prompt(writer, texts[0], config)
    start = time.monotonic()
    for first in range(0, len(texts), config.batch_size):
        batch = texts[first : first + config.batch_size]
        began = -1
        for row, piece in in_order(batch, writer.write(batch, config)):
            if row > began:
                began = row
                heading = f"―― {first + row + 1} / {len(texts)} ――\n" if len(texts) > 1 else ""
                print(f"{2 * chr(10) if first + row else ''}{heading}{prompt}", end="")
            print(piece, end="", flush=True)
    print(flush=True)
    report_speed(texts, start)


def in_order(texts: list[TextStream], pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """The same pieces, all of a text before those of the next; each text has at least an empty one."""
    waiting = [""] * len(texts)
    current = 0
    for row, piece in pieces:
        waiting[row] += piece
        while current < len(texts):
            yield current, waiting[current]
            waiting[current] = ""
            if not texts[current].finish:
                break
            current += 1


def write_many(writer: TextGenerator, config: InferenceConfig, prompts: list[str], seed: int) -> None:
    """A JSON object a line for each text, in the order of the prompts."""
    for prompt in prompts:
        encode_prompt(writer.tokenizer, prompt)  # a mistake in the last one is told before the first is written
    jobs = [(prompt, number) for prompt in prompts for number in range(config.num_samples)]
    start, done = time.monotonic(), []
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"  # else an escape of the locale's comes in
    with progress_bar(len(jobs), "text", "write") as progress:
        for first in range(0, len(jobs), config.batch_size):
            batch = jobs[first : first + config.batch_size]
            texts = [writer.begin(prompt, config, seed, number) for prompt, number in batch]
            written = [""] * len(batch)
            for row, piece in writer.write(texts, config):
                written[row] += piece
            for (prompt, number), text, words in zip(batch, texts, written, strict=True):
                line = {"prompt": prompt, "text": words, "seed": (seed + number) % MAX_SEED}
                line |= {"tokens": text.n_new, "finish": text.finish}
                print(json.dumps(line, ensure_ascii=not is_utf8), flush=True)
            done += texts
            progress(len(batch))
    report_speed(done, start)


def read_prompts(path: Path) -> list[str]:
    """Raises UserError."""
    try:
        lines = [line.removesuffix("\r") for line in path.read_text("utf-8-sig").split("\n")]  # a text may hold U+2028
    except (UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"--prompts_file {path}: no UTF-8 text ({error}); name a .txt or .jsonl file")
    if path.name.lower().endswith(".jsonl"):
        prompts = [prompt_of_line(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts_file {path} holds no prompt; put one on each line")
    return prompts


def prompt_of_line(path: Path, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str):
            return prompt
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(f'--prompts_file {path}: line {number}: give an object such as {{"prompt": "雨が"}}')


HELP = """\
書き出しを入れると、その続きを書きます(\\n は改行)。書いている途中は Ctrl-C で止まります(入力中は終わります)。
  (空行)            今の文章の続きを書く
  /again            同じ書き出しから、別の文章を書く
  /edit             直前の書き出しを直して書く
  /text             今の文章の全文を見る
  /set 名前 値      設定を変える(例: /set temperature 0.7、/set top_k none、/set stop none)
  /settings         今の設定を見る
  /quit             終わる(Ctrl-D でも)"""


def converse(writer: TextGenerator, config: InferenceConfig, seed: int) -> None:
    """Texts in turns, on a terminal: a beginning is typed, changed, gone on from."""
    settings: GenerationSettings = GenerationSettings(
        **{field.name: getattr(config, field.name) for field in dataclasses.fields(GenerationSettings)}
    )
    print(HELP)
    prompt, text, n_again = "", "", 0
    while (line := ask()) is not None:
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/help":
                print(HELP)
            elif command == "/settings":
                print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(settings).items()))
            elif command == "/text":
                print(text)
            elif command == "/set":
                name, _, value = rest.strip().partition(" ")
                value = unescape(value.strip())
                settings = replace_setting(settings, name, "" if (name, value) == ("stop", "none") else value)
            elif command in ("/again", "/edit", "") or not command.startswith("/"):
                if command == "/edit":
                    edited = ask(prompt.replace("\n", "\\n"))
                    if edited is None:  # Ctrl-C: as it was
                        continue
                    prompt = text = unescape(edited or prompt)
                elif command == "/again":
                    text, n_again = prompt, n_again + 1
                elif line:
                    prompt = text = unescape(line)
                n_again = n_again if command == "/again" else 0
                if not text:
                    print("まだ文章がありません。書き出しを入れてください。")
                    continue
                text += write_live(writer, text, settings, seed if settings.seed is None else settings.seed + n_again)
                seed += 1
            else:
                print(f"{command} というコマンドはありません(/help で使い方)")
        except UserError as error:
            print(f"error: {error}")


def unescape(line: str) -> str:
    return line.replace("\\n", "\n")


def ask(prefilled: str = "") -> str | None:
    """A line of the user's, None at the end of input; with `prefilled`, that is there to be changed."""
    try:
        import readline

        readline.set_startup_hook(lambda: readline.insert_text(prefilled))
    except ImportError:
        pass  # a Python without it: the line is typed anew
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def write_live(writer: TextGenerator, prompt: str, settings: GenerationSettings, seed: int) -> str:
    """What is written after the prompt, shown as it comes, to its end or to Ctrl-C."""
    text = writer.begin(prompt, settings, seed)
    warn_about_prompt(writer, text, settings)
    start, written = time.monotonic(), ""
    print(prompt, end="", flush=True)
    pieces = writer.write([text], settings)
    try:
        for _, piece in pieces:
            written += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pieces.close()
    print(flush=True)
    report_speed([text], start)
    return written


def warn_about_prompt(writer: TextGenerator, text: TextStream, settings: GenerationSettings) -> None:
    """What a user may not expect: unknown tokens, and where the model cannot see all of the text."""
    unknown_id, context_length = writer.tokenizer.unknown_id, writer.model.config.context_length
    n_unknown = text.prompt.count(unknown_id) if unknown_id is not None else 0
    if n_unknown:
        print(
            f"note: {n_unknown} of the prompt's {len(text.prompt) - 1} tokens are unknown to the tokenizer",
            file=sys.stderr,
        )
    start = window_start(len(text.prompt), context_length)
    if start:
        print(
            f"note: the prompt is {len(text.prompt)} tokens and the model sees {context_length}; it reads the last"
            f" {len(text.prompt) - start}",
            file=sys.stderr,
        )
    elif len(text.prompt) + settings.max_new_tokens > context_length:
        print(
            f"note: the model sees {context_length} tokens; past that it goes on from the last half of them",
            file=sys.stderr,
        )


def report_speed(texts: list[TextStream], start: float) -> None:
    n_tokens = sum(text.n_new for text in texts)
    print(f"{n_tokens} tokens, {n_tokens / (time.monotonic() - start):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_command(InferenceConfig, main)
