"""A page in the browser to write with a trained GPT: text as it comes, upright or 縦書き, two settings side by side.

    python demo.py --exp_dir exp001

Needs gradio (pip install gradio). Serves this machine alone unless --host says otherwise; sends nothing anywhere, reads
no file that a visitor names, and keeps nothing of what is written.
"""

import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt_model import GPTModel
from gptkit.base import devices
from gptkit.base.cli import UserError, check_bounds, run_command, setting
from gptkit.generation.cpu_linear import prepare_for_generation
from gptkit.generation.generate import TextStream, stream_text
from gptkit.generation.sampling import SamplingSettings
from gptkit.text.tokenizer import Tokenizer, encode_prompt
from gptkit.training import checkpoints

MAX_CHARS = 20_000  # of a prompt, or of a text to go on from
MAX_REQUEST_BYTES = 1 << 20
MAX_WAITING = 20  # requests in the queue; more are turned away
REDRAW_S = 0.05  # a page needs no more pictures a second than a film
N_MODELS = 3  # checkpoints kept in memory

CSS = """
.honbun textarea { font-family: "Noto Serif CJK JP", "Noto Serif JP", "Hiragino Mincho ProN", "Yu Mincho", serif;
                 font-size: 1.15rem; line-height: 1.9; }
.honbun.tategaki textarea { writing-mode: vertical-rl; height: 60vh !important; overflow-x: auto; letter-spacing: .05em; }
"""
TURN = "(upright) => { document.querySelectorAll('.honbun').forEach(e => e.classList.toggle('tategaki', upright)); }"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """A page in the browser to write with a trained GPT."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)")
    compare_exp_dir: str | None = setting(None, "another experiment, to choose its checkpoints too")
    host: str = setting("127.0.0.1", "address to serve; 0.0.0.0 lets other machines in")
    port: int = setting(7860, "port to serve, 0 for any that is free", at_least=0, at_most=65535)
    most_new_tokens: int = setting(2000, "longest text that may be asked for", at_least=1, at_most=100_000)
    n_at_once: int = setting(1, "texts written at the same time; others wait", at_least=1, at_most=64)
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")


@dataclass(frozen=True)
class Model:
    model: GPTModel
    tokenizer: Tokenizer
    draft: GPTModel | None


def main(config: DemoConfig) -> None:
    gradio = import_gradio()
    device = devices.choose_device(config.device)
    folders = find_folders([config.exp_dir, *([config.compare_exp_dir] if config.compare_exp_dir else [])])
    load = functools.lru_cache(maxsize=N_MODELS)(lambda name: load_model(folders[name], device))
    load(next(iter(folders)))  # a mistake is told here, not to a visitor
    page = build_page(gradio, config, list(folders), load)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=config.n_at_once)
    from starlette.middleware import Middleware

    try:
        page.launch(
            server_name=config.host, server_port=config.port or free_port(config.host), css=CSS, footer_links=[],
            share=False, ssr_mode=False, show_error=True, max_file_size=1, state_session_capacity=100,
            app_kwargs={"middleware": [Middleware(SmallRequests)], "docs_url": None, "redoc_url": None},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {config.port} of --host {config.host} cannot be served ({error}); give another")


def import_gradio() -> Any:
    """Raises UserError where it is missing. Nothing is told to its makers."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("demo.py needs gradio; run: pip install gradio")
    return gradio


def free_port(host: str) -> int:
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class SmallRequests:
    """ASGI: a request whose body is larger than MAX_REQUEST_BYTES is cut off there."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        n_bytes = 0

        async def bounded() -> Any:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            return {"type": "http.disconnect"} if n_bytes > MAX_REQUEST_BYTES else message

        await self.app(scope, bounded if scope["type"] == "http" else receive, send)


def find_folders(exp_dirs: list[str]) -> dict[str, Path]:
    """The checkpoints of the experiments, by the name that the page shows, the newest of the first one first."""
    folders = {}
    for number, exp_dir in enumerate(exp_dirs):
        shown = Path(exp_dir).resolve().name  # a visitor need not know where it lies
        shown = (
            f"{shown} ({number + 1})" if shown in {Path(other).resolve().name for other in exp_dirs[:number]} else shown
        )
        newest = checkpoints.choose_checkpoint(exp_dir, "newest")
        found = checkpoints.find_checkpoints(newest.parent) or [newest]
        for folder in sorted(found, key=lambda folder: (folder != newest, -found.index(folder))):
            folders[f"{shown} {folder.name.removeprefix('step_').lstrip('0')}"] = folder
    return folders


def load_model(folder: Path, device: torch.device) -> Model:
    """Raises UserError."""
    checkpoints.first_valid([folder], training=False)
    model, tokenizer = checkpoints.load_checkpoint(folder, GPTModel.from_dimensions, device)
    draft = prepare_for_generation(model, with_draft=True) if device.type == "cpu" else None
    return Model(model.eval(), tokenizer, draft)


def growing_text(model: Model, prompt: str, sampling: SamplingSettings, n_tokens: int, seed: int) -> Iterator[str]:
    """The prompt and what comes after it, again and again, longer each time. Raises UserError."""
    if len(prompt) > MAX_CHARS:
        raise UserError(f"文章が長すぎます({len(prompt):,} 字)。{MAX_CHARS:,} 字までにしてください。")
    check_bounds(sampling)
    text = TextStream(model.tokenizer, encode_prompt(model.tokenizer, prompt), seed)
    drawn_at, written = 0.0, prompt
    context_length = model.model.config.context_length
    for _, piece in stream_text(model.model, [text], sampling, n_tokens, context_length, draft=model.draft):
        written += piece
        if time.monotonic() - drawn_at > REDRAW_S:
            drawn_at = time.monotonic()
            yield written
    yield written


def build_page(gradio: Any, config: DemoConfig, names: list[str], load: Callable[[str], Model]) -> Any:
    """The page as gradio.Blocks."""

    def begin(prompt: str | None, name: str, *values: Any) -> Iterator[str]:
        """`values` as `panel` makes them."""
        temperature, top_k, top_p, min_p, penalty, n_tokens, seed = values
        try:
            sampling = SamplingSettings(
                temperature=temperature,
                top_k=int(top_k) or None,
                top_p=top_p if top_p < 1 else None,
                min_p=min_p,
                repetition_penalty=penalty,
            )
            n_tokens = min(int(n_tokens), config.most_new_tokens)
            seed = random.SystemRandom().randrange(2**32) if seed is None or seed < 0 else int(seed) % 2**63
            yield from growing_text(load(name), prompt or "", sampling, n_tokens, seed)
        except (UserError, ValueError, TypeError, OverflowError) as error:
            raise gradio.Error(str(error), print_exception=False)

    def go_on_from(text: str | None, selected: int | None, *values: Any) -> Iterator[str]:
        """From the end of what is selected, or from the end of the text."""
        yield from begin((text or "")[: selected or None], *values)

    def both(prompt: str, *values: Any) -> Iterator[tuple[str, str]]:
        """Two texts, a step of each in turn."""
        half = len(values) // 2
        texts, last = [begin(prompt, *values[:half]), begin(prompt, *values[half:])], ["", ""]
        while texts[0] or texts[1]:
            for i, text in enumerate(texts):
                found = next(text, None) if text else None
                last[i] = last[i] if found is None else found
                texts[i] = text if found is not None else None  # type: ignore[assignment]
            yield last[0], last[1]

    def panel(number: int = 0) -> list[Any]:
        """Which model, and how to draw: the inputs of `begin` but for the prompt."""
        slider = gradio.Slider
        return [
            gradio.Dropdown(names, value=names[min(number, len(names) - 1)], label="モデル(ステップ)"),
            slider(0, 2, 0.8, step=0.05, label="温度", info="0 は最もありそうな語だけ"),
            slider(0, 500, 0, step=1, label="top-k", info="0 は制限なし"),
            slider(0.01, 1, 0.95, step=0.01, label="top-p", info="1 は制限なし"),
            slider(0, 1, 0, step=0.01, label="min-p", info="0 は制限なし"),
            slider(0.5, 2, 1.1, step=0.05, label="繰り返しを抑える", info="1 は抑えない"),
            slider(1, config.most_new_tokens, min(300, config.most_new_tokens), step=1, label="長さ(トークン)"),
            gradio.Number(-1, label="種", info="同じ種からは同じ文章。-1 は毎回変える", precision=0, minimum=-1),
        ]

    def body(label: str, name: str) -> Any:
        return gradio.Textbox(
            label=label, lines=16, max_lines=16, max_length=MAX_CHARS, interactive=True, elem_classes="honbun",
            elem_id=name, buttons=["copy"]
        )  # fmt: skip

    def select(event: gradio.SelectData) -> int:
        return int(event.index[1])

    shared = dict(concurrency_id="write", concurrency_limit=config.n_at_once, show_progress="minimal")
    with gradio.Blocks(title="文章を書く", analytics_enabled=False) as page:
        turn = gradio.Checkbox(False, label="縦書き", elem_id="tategaki")
        turn.change(None, turn, None, js=TURN)
        with gradio.Tab("書く"), gradio.Row():
            with gradio.Column(scale=2):
                prompt = gradio.Textbox(
                    "吾輩は猫である。", label="書き出し", lines=3, max_lines=12, max_length=MAX_CHARS, elem_id="prompt"
                )
                with gradio.Row():
                    start = gradio.Button("書く", variant="primary", elem_id="start")
                    more = gradio.Button("続きを書く(選んだ所から、なければ末尾から)", elem_id="more")
                    stop = gradio.Button("止める", variant="stop", elem_id="stop")
                text, selected = body("本文(直してから続きを書くこともできます)", "text"), gradio.State(None)
            with gradio.Column(scale=1):
                settings = panel()
            running = [
                start.click(begin, [prompt, *settings], text, **shared),
                more.click(go_on_from, [text, selected, *settings], text, **shared),
            ]
            text.select(select, None, selected, queue=False)
            text.input(lambda: None, None, selected, queue=False)
            stop.click(None, cancels=running)
        with gradio.Tab("くらべる"):
            same_prompt = gradio.Textbox("吾輩は猫である。", label="書き出し", lines=3, max_length=MAX_CHARS)
            with gradio.Row():
                start_both, stop_both = (
                    gradio.Button("両方で書く", variant="primary"),
                    gradio.Button("止める", variant="stop"),
                )
            columns, texts = [], []
            with gradio.Row():
                for number, label in enumerate("甲乙"):
                    with gradio.Column():
                        texts.append(body(label, f"text_{number}"))
                        columns.append(panel(number))
            running_both = start_both.click(both, [same_prompt, *columns[0], *columns[1]], texts, **shared)
            stop_both.click(None, cancels=[running_both])
    return page


if __name__ == "__main__":
    run_command(DemoConfig, main)
