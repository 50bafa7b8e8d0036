"""Generate text with a trained GPT: an experiment folder and a prompt in, text out as it is generated.

    python inference.py --exp_dir exp001 --prompt "吾輩は猫である。名前は" --max_new_tokens 200
    python inference.py --exp_dir exp001 --interactive
    python inference.py --exp_dir exp001 --prompts_file prompts.txt > texts.jsonl

Needs only the checkpoint: no network, no dataset. Everything but the text goes to standard error.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

import codecs
import contextlib
import dataclasses
import json
import random
import sys
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from gpt_model import GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, progress_bar, replace_setting, run_command, setting
from gptkit.base.paths import existing_path
from gptkit.generation.cpu_linear import Int8Linear, prepare_for_generation, replace_linear_layers
from gptkit.generation.generate import Decode, TextStream, compiled_decode, decode_one_token, stream_text, window_start
from gptkit.generation.prompts import prepare_standard_input, read_prompts, read_standard_input
from gptkit.generation.sampling import SamplingSettings
from gptkit.text.tokenizer import Tokenizer, encode_prompt
from gptkit.training.loading import CHOICE_HELP, Choice, checkpoint_name, load_chosen

MAX_SEED = 2**63 - 1
COMPILE_FROM_TOKENS = 500  # on CUDA: fewer do not make up for the time that compilation takes


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(SamplingSettings):
    """The settings that may change from text to text."""

    max_new_tokens: int = setting(200, "most tokens to generate", at_least=1, at_most=1_000_000, group="text")
    seed: int | None = setting(
        None, "the same seed gives the same text (default: any)", at_least=0, at_most=MAX_SEED, group="sampling"
    )
    stop: tuple[str, ...] = setting((), "end before the first of these texts", group="text", is_text=True)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(GenerationSettings):
    """Generate text with a trained GPT."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)", group="model")
    prompt: str | None = setting(
        None, 'beginning of the text, "" for any; - reads it from standard input', group="prompt", is_text=True
    )
    prompts_file: str | None = setting(
        None,
        "many prompts: the lines of a .txt file, or the prompt of each line of .jsonl; prints JSONL",
        group="prompt",
    )
    interactive: bool = setting(
        False, "write in turns: type a beginning, read the text, continue it or change the beginning", group="prompt"
    )
    num_samples: int = setting(1, "texts per prompt, by seeds from --seed on", at_least=1, at_most=1024, group="text")
    batch_size: int = setting(8, "texts generated at once", at_least=1, at_most=1024, group="text")
    checkpoint: Choice = setting("averaged", CHOICE_HELP, group="model")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")
    dtype: devices.DtypeName = setting(
        "auto", "type of the weights (auto: on a GPU bfloat16, or float16 on older ones; else float32)", group="device"
    )
    quantize: Literal["none", "int8"] = setting("none", "int8: weights in 8 bits, faster on a CPU", group="device")
    compile: bool | None = setting(
        None, f"use torch.compile for each token (default: for {COMPILE_FROM_TOKENS} or more on CUDA)", group="device"
    )


@dataclass(frozen=True)
class TextGenerator:
    """A model with all that it needs to generate text."""

    model: GPTModel
    tokenizer: Tokenizer
    decode: Decode
    draft: GPTModel | None

    def new_text(self, prompt: str, settings: GenerationSettings, seed: int) -> TextStream:
        """Return a text that begins with the prompt. Raises UserError where the tokenizer cannot encode it."""
        return TextStream(self.tokenizer, encode_prompt(self.tokenizer, prompt), seed % MAX_SEED, settings.stop)

    def stream(self, texts: list[TextStream], settings: GenerationSettings) -> Generator[tuple[int, str], None, None]:
        """Yield (row, characters) of the texts as they are generated."""
        model, context_length = self.model, self.model.config.context_length
        return stream_text(model, texts, settings, settings.max_new_tokens, context_length, self.decode, self.draft)


def main(config: InferenceConfig) -> None:
    if [config.prompt is not None, config.prompts_file is not None, config.interactive].count(True) != 1:
        raise UserError("give one of --prompt, --prompts_file and --interactive")
    reads_stdin = "--prompt -" if config.prompt == "-" else "--interactive" if config.interactive else None
    if reads_stdin:
        prepare_standard_input(reads_stdin)
    file = None if config.prompts_file is None else existing_path(config.prompts_file, "--prompts_file")
    prompts = [] if file is None else read_prompts(file)
    generator = load_generator(config)
    seed = random.SystemRandom().randrange(2**32) if config.seed is None else config.seed
    if config.interactive:
        converse(generator, config, seed)
    elif config.prompts_file is not None:
        print_json_lines(generator, config, prompts, seed)
    else:
        print_samples(generator, config, read_standard_input(reads_stdin) if reads_stdin else config.prompt or "", seed)


def load_generator(config: InferenceConfig) -> TextGenerator:
    """Load the checkpoint that the settings name and make it fast. Raises UserError."""
    device = devices.choose_device(config.device)
    if config.quantize == "int8" and (device.type != "cpu" or config.dtype in ("bfloat16", "float16")):
        raise UserError(
            f"--quantize int8 is for float32 on the CPU, not for --dtype {config.dtype} on {device.type}; leave it out, or"
            " add --device cpu --dtype float32"
        )
    if config.quantize == "int8" and config.compile:
        raise UserError("--quantize int8 cannot be compiled; leave --compile out")
    build = GPTModel.from_dimensions
    folder, model, tokenizer, is_averaged = load_chosen(config.exp_dir, config.checkpoint, build, device)
    dtype = devices.choose_dtype(config.dtype, device)
    model = model.to(dtype).eval()
    precision = "int8" if config.quantize == "int8" else devices.dtype_name(dtype)
    size, where = f"{model.n_parameters():,} parameters", devices.describe_device(device)
    print(f"{checkpoint_name(folder, is_averaged)}: {size} on {where}, {precision}", file=sys.stderr)
    compile, draft = config.compile, None
    if compile is None:
        compile = device.type == "cuda" and config.max_new_tokens >= COMPILE_FROM_TOKENS
    if config.quantize == "int8":
        replace_linear_layers(model, Int8Linear)
    elif device.type == "cpu" and dtype == torch.float32 and not compile:
        one_at_a_time = config.batch_size == 1 or (config.num_samples == 1 and not config.prompts_file)
        draft = prepare_for_generation(model, with_draft=config.interactive or one_at_a_time)
    return TextGenerator(model, tokenizer, compiled_decode() if compile else decode_one_token, draft)


def print_samples(generator: TextGenerator, config: InferenceConfig, prompt: str, seed: int) -> None:
    """Print the texts of one prompt as they are generated, one below the other."""
    texts = [generator.new_text(prompt, config, seed + i) for i in range(config.num_samples)]
    warn_about_prompt(generator, texts[0], config)
    start = time.monotonic()
    for first in range(0, len(texts), config.batch_size):
        batch = texts[first : first + config.batch_size]
        last_row = -1
        for row, piece in in_row_order(batch, generator.stream(batch, config)):
            if row > last_row:
                last_row = row
                heading = f"―― {first + row + 1} / {len(texts)} ――\n" if len(texts) > 1 else ""
                print("\n\n" if first + row else "", heading, prompt, sep="", end="")
            print(piece, end="", flush=True)
    print(flush=True)
    report_speed(texts, start)


def in_row_order(texts: list[TextStream], pieces: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield the pieces sorted by text, as early as possible; each text has at least an empty one."""
    waiting = [""] * len(texts)
    current = 0
    for row, piece in pieces:
        waiting[row] += piece
        while current < len(texts):
            yield current, waiting[current]
            waiting[current] = ""
            if not texts[current].finish_reason:
                break
            current += 1


def print_json_lines(generator: TextGenerator, config: InferenceConfig, prompts: list[str], seed: int) -> None:
    """Print a JSON object on a line for each text, in the order of the prompts."""
    for prompt in prompts:
        encode_prompt(generator.tokenizer, prompt)  # report a mistake in any before the first is done
    jobs = [(prompt, (seed + i) % MAX_SEED) for prompt in prompts for i in range(config.num_samples)]
    start, done = time.monotonic(), []
    is_utf8 = codecs.lookup(sys.stdout.encoding or "ascii").name == "utf-8"  # else only JSON's own escapes are JSON
    with progress_bar(len(jobs), "text", "write") as progress:
        for first in range(0, len(jobs), config.batch_size):
            batch = jobs[first : first + config.batch_size]
            texts = [generator.new_text(prompt, config, job_seed) for prompt, job_seed in batch]
            continuations = [""] * len(batch)
            for row, piece in generator.stream(texts, config):
                continuations[row] += piece
            for (prompt, job_seed), text, continuation in zip(batch, texts, continuations, strict=True):
                line = {"prompt": prompt, "text": continuation, "seed": job_seed}
                line |= {"tokens": text.n_new, "finish": text.finish_reason}
                print(json.dumps(line, ensure_ascii=not is_utf8), flush=True)
            done += texts
            progress(len(batch))
    report_speed(done, start)


HELP = """\
書き出しを入れると、その続きを書きます(\\n は改行)。書いている途中は Ctrl-C で止まります(入力中は終わります)。
  (空行)            今の文章の続きを書く
  /again            同じ書き出しから、別の文章を書く
  /edit             直前の書き出しを直して書く
  /text             今の文章の全文を見る
  /set 名前 値      設定を変える(例: /set temperature 0.7、/set top_k none、/set stop none)
  /settings         今の設定を見る
  /quit             終わる(Ctrl-D でも)"""


def converse(generator: TextGenerator, config: InferenceConfig, seed: int) -> None:
    """Answer the lines that the user types until /quit or the end of input."""
    names = [field.name for field in dataclasses.fields(GenerationSettings)]
    conversation = Conversation(generator, GenerationSettings(**{name: getattr(config, name) for name in names}), seed)
    print(HELP)
    line = ask()
    if line is None and not sys.stdin.isatty():
        raise UserError("--interactive reads what you type, and standard input is empty; run it in a terminal")
    while line is not None and line.partition(" ")[0] != "/quit":
        try:
            conversation.answer(line)
        except UserError as error:
            print(f"error: {error}")
        line = ask()


@dataclass
class Conversation:
    """The state of --interactive between lines."""

    generator: TextGenerator
    settings: GenerationSettings
    seed: int  # of the next text, unless the settings have one
    prompt: str = ""
    text: str = ""  # the prompt and what was generated after it
    n_again: int = 0  # how often /again was given for this prompt

    def answer(self, line: str) -> None:
        """Run a command, or generate text after a new prompt or (empty line) the text so far. Raises UserError."""
        command, _, argument = line.partition(" ")
        if command == "/help":
            print(HELP)
        elif command == "/settings":
            print(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.settings).items()))
        elif command == "/text":
            print(self.text)
        elif command == "/set":
            name, _, value = argument.strip().partition(" ")
            value = unescape(value.strip())
            self.settings = replace_setting(self.settings, name, "" if (name, value) == ("stop", "none") else value)
        elif command == "/again":
            self.text, self.n_again = self.prompt, self.n_again + 1
            self.continue_text()
        elif command == "/edit":
            edited = ask(self.prompt.replace("\n", "\\n"))
            if edited is not None:  # Ctrl-C leaves the prompt as it was
                self.prompt = self.text = unescape(edited or self.prompt)
                self.n_again = 0
                self.continue_text()
        elif command.startswith("/"):
            print(f"{command} というコマンドはありません(/help で使い方)")
        else:
            if line:
                self.prompt = self.text = unescape(line)
            self.n_again = 0
            self.continue_text()

    def continue_text(self) -> None:
        """Print the text and what is generated after it, as it comes, to its end or to Ctrl-C."""
        if not self.text:
            print("まだ文章がありません。書き出しを入れてください。")
            return
        seed = self.seed if self.settings.seed is None else self.settings.seed + self.n_again
        stream = self.generator.new_text(self.text, self.settings, seed)
        warn_about_prompt(self.generator, stream, self.settings)
        start, continuation = time.monotonic(), ""
        print(self.text, end="", flush=True)
        pieces = self.generator.stream([stream], self.settings)
        try:
            for _, piece in pieces:
                continuation += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
        print(flush=True)
        report_speed([stream], start)
        self.text += continuation
        self.seed += 1


def unescape(line: str) -> str:
    return line.replace("\\n", "\n")


def ask(prefilled: str = "") -> str | None:
    """Return a line that the user types, or None at the end of input; the user may edit `prefilled`."""
    if sys.getfilesystemencoding() != "ascii":  # in such a locale readline drops Japanese
        with contextlib.suppress(ImportError):  # without readline, the user types the line again
            import readline

            readline.set_startup_hook(lambda: readline.insert_text(prefilled))
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt, OSError):  # under nohup, standard input cannot be read
        print()
        return None


def warn_about_prompt(generator: TextGenerator, text: TextStream, settings: GenerationSettings) -> None:
    """Print a note where the prompt has unknown tokens, and where the model cannot see all of the text."""
    unknown_id, context_length = generator.tokenizer.unknown_id, generator.model.config.context_length
    n_prompt = len(text.prompt)  # tokens; the first is end-of-text
    notes = []
    if unknown_id is not None and (n_unknown := text.prompt.count(unknown_id)):
        notes.append(f"{n_unknown} of the prompt's {n_prompt - 1} tokens are unknown to the tokenizer")
    if start := window_start(n_prompt, context_length):
        n_read = n_prompt - start
        notes.append(f"the prompt is {n_prompt} tokens and the model sees {context_length}; it reads the last {n_read}")
    elif n_prompt + settings.max_new_tokens > context_length:
        notes.append(f"the model sees {context_length} tokens; past that it continues from the last half of them")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def report_speed(texts: list[TextStream], start: float) -> None:
    n_tokens = sum(text.n_new for text in texts)
    print(f"{n_tokens} tokens, {n_tokens / (time.monotonic() - start):.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    run_command(InferenceConfig, main, prints_its_work=True)
