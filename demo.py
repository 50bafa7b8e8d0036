"""Serve a page in the browser to write with a trained GPT: text as it comes, horizontal or 縦書き, two models side by side.

    python demo.py --exp_dir exp001

Needs gradio (pip install gradio). Serves only this machine unless --host names another address; sends nothing anywhere,
reads no file that a visitor names, and keeps nothing of what is written.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

import functools
import os
import random
import sys
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
from gptkit.training.loading import choose_checkpoint, load_checkpoint

MAX_CHARS = 20_000  # of a prompt, or of a text to continue
MAX_REQUEST_BYTES = 1 << 20
MAX_WAITING = 20  # requests in the queue; more are refused
REDRAW_S = 0.05  # at least this long between two updates of a text on the page
N_MODELS = 3  # checkpoints kept in memory

CSS = """
.honbun textarea { font-family: "Noto Serif CJK JP", "Noto Serif JP", "Hiragino Mincho ProN", "Yu Mincho", serif;
                 font-size: 1.15rem; line-height: 1.9; }
.honbun.tategaki textarea { writing-mode: vertical-rl; height: 60vh !important; overflow-x: auto; letter-spacing: .05em; }
"""
TOGGLE_VERTICAL_JS = (
    "(upright) => { document.querySelectorAll('.honbun').forEach(e => e.classList.toggle('tategaki', upright)); }"
)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Serve a page in the browser to write with a trained GPT."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)", group="model")
    compare_exp_dir: str | None = setting(None, "another experiment, to choose its checkpoints too", group="model")
    host: str = setting("127.0.0.1", "address to serve; 0.0.0.0 lets other machines in", group="server")
    port: int = setting(7860, "port to serve, 0 for any that is free", at_least=0, at_most=65535, group="server")
    most_new_tokens: int = setting(
        2000, "longest text that a visitor may ask for", at_least=1, at_most=100_000, group="server"
    )
    n_at_once: int = setting(1, "texts generated at the same time; others wait", at_least=1, at_most=64, group="server")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps", group="device")


@dataclass(frozen=True)
class LoadedModel:
    model: GPTModel
    tokenizer: Tokenizer
    draft: GPTModel | None


def main(config: DemoConfig) -> None:
    gradio = import_gradio()
    device = devices.choose_device(config.device)
    folders = find_folders([config.exp_dir, *([config.compare_exp_dir] if config.compare_exp_dir else [])])
    load = functools.lru_cache(maxsize=N_MODELS)(lambda name: load_model(folders[name], device))
    load(next(iter(folders)))  # so that a mistake is reported here, not to a visitor
    page = build_page(gradio, config, list(folders), load)
    page.queue(max_size=MAX_WAITING, default_concurrency_limit=config.n_at_once)
    from starlette.middleware import Middleware

    try:
        page.launch(
            server_name=config.host, server_port=config.port or free_port(config.host), css=CSS, footer_links=[],
            share=False, ssr_mode=False, show_error=True, max_file_size=1, state_session_capacity=100,
            app_kwargs={"middleware": [Middleware(RequestSizeLimit)], "docs_url": None, "redoc_url": None},
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {config.port} of --host {config.host} cannot be served ({error}); give another")


def import_gradio() -> Any:
    """Import gradio with its telemetry off. Raises UserError where it is missing."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise UserError("demo.py needs gradio; run: pip install gradio")
    return gradio


def free_port(host: str) -> int:
    """Return a port of the host that nothing uses."""
    import socket

    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


class RequestSizeLimit:
    """ASGI middleware that cuts off a request whose body is larger than MAX_REQUEST_BYTES."""

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
    """Return the checkpoints of the experiments by the names that the page shows, the newest of the first one first."""
    folders, names = {}, [Path(exp_dir).resolve().name for exp_dir in exp_dirs]  # no visitor needs the full path
    for number, (exp_dir, name) in enumerate(zip(exp_dirs, names, strict=True)):
        if name in names[:number]:
            name = f"{name} ({number + 1})"
        newest = choose_checkpoint(exp_dir, "averaged")
        found = checkpoints.find_checkpoints(newest.parent) or [newest]
        for folder in sorted(found, key=lambda folder: (folder != newest, -found.index(folder))):
            folders[f"{name} {folder.name.removeprefix('step_').lstrip('0')}"] = folder
    return folders


def load_model(folder: Path, device: torch.device) -> LoadedModel:
    """Load a checkpoint, its averaged weights where it has them, and make it fast.

    Raises UserError where it is damaged.
    """
    checkpoints.first_valid([folder], training=False)
    is_averaged = checkpoints.has_average(folder)
    model, tokenizer = load_checkpoint(folder, GPTModel.from_dimensions, device, is_averaged)
    if is_averaged:
        print(f"note: {folder} writes with its averaged weights", file=sys.stderr)
    draft = prepare_for_generation(model, with_draft=True) if device.type == "cpu" else None
    return LoadedModel(model.eval(), tokenizer, draft)


def growing_text(
    loaded: LoadedModel, prompt: str, sampling: SamplingSettings, n_tokens: int, seed: int
) -> Iterator[str]:
    """Yield the prompt with what is generated after it, longer each time. Raises UserError."""
    if len(prompt) > MAX_CHARS:
        raise UserError(f"文章が長すぎます({len(prompt):,} 字)。{MAX_CHARS:,} 字までにしてください。")
    check_bounds(sampling)
    text = TextStream(loaded.tokenizer, encode_prompt(loaded.tokenizer, prompt), seed)
    updated_at, content = 0.0, prompt
    context_length = loaded.model.config.context_length
    for _, piece in stream_text(loaded.model, [text], sampling, n_tokens, context_length, draft=loaded.draft):
        content += piece
        if time.monotonic() - updated_at > REDRAW_S:
            updated_at = time.monotonic()
            yield content
    yield content


@dataclass(frozen=True)
class PageBuilder:
    """The parts of the page, and what its buttons do. `values` are those of a settings_panel."""

    gradio: Any
    config: DemoConfig
    names: list[str]  # of the checkpoints
    load: Callable[[str], LoadedModel]

    def write(self, prompt: str | None, name: str, *values: Any) -> Iterator[str]:
        """Yield the prompt with what is generated after it, longer each time."""
        temperature, top_k, top_p, min_p, penalty, n_tokens, seed = values
        try:
            sampling = SamplingSettings(
                temperature=temperature,
                top_k=int(top_k) or None,
                top_p=top_p if top_p < 1 else None,
                min_p=min_p,
                repetition_penalty=penalty,
            )
            n_tokens = min(int(n_tokens), self.config.most_new_tokens)
            seed = random.SystemRandom().randrange(2**32) if seed is None or seed < 0 else int(seed) % 2**63
            yield from growing_text(self.load(name), prompt or "", sampling, n_tokens, seed)
        except (UserError, ValueError, TypeError, OverflowError) as error:
            raise self.gradio.Error(str(error), print_exception=False)

    def continue_text(self, text: str | None, selection_end: int | None, *values: Any) -> Iterator[str]:
        """Continue the text from the end of what is selected in it, or from its own end."""
        yield from self.write((text or "")[: selection_end or None], *values)

    def write_both(self, prompt: str, *values: Any) -> Iterator[tuple[str, str]]:
        """Generate two texts in turn, piece by piece; the first half of the values is for the first one."""
        half = len(values) // 2
        texts = [self.write(prompt, *values[:half]), self.write(prompt, *values[half:])]
        latest, running = ["", ""], [True, True]
        while any(running):
            for i, text in enumerate(texts):
                content = next(text, None) if running[i] else None
                running[i] = content is not None
                latest[i] = latest[i] if content is None else content
            yield latest[0], latest[1]

    def settings_panel(self, number: int = 0) -> list[Any]:
        """Return the inputs for the model and how to draw: those of `write` but for the prompt."""
        gradio, slider = self.gradio, self.gradio.Slider
        most = self.config.most_new_tokens
        return [
            gradio.Dropdown(self.names, value=self.names[min(number, len(self.names) - 1)], label="モデル(ステップ)"),
            slider(0, 2, 0.8, step=0.05, label="温度", info="0 は最もありそうな語だけ"),
            slider(0, 500, 0, step=1, label="top-k", info="0 は制限なし"),
            slider(0.01, 1, 0.95, step=0.01, label="top-p", info="1 は制限なし"),
            slider(0, 1, 0, step=0.01, label="min-p", info="0 は制限なし"),
            slider(0.5, 2, 1.1, step=0.05, label="繰り返しを抑える", info="1 は抑えない"),
            slider(1, most, min(300, most), step=1, label="長さ(トークン)"),
            gradio.Number(-1, label="種", info="同じ種からは同じ文章。-1 は毎回変える", precision=0, minimum=-1),
        ]

    def text_box(self, label: str, name: str) -> Any:
        return self.gradio.Textbox(
            label=label, lines=16, max_lines=16, max_length=MAX_CHARS, interactive=True, elem_classes="honbun",
            elem_id=name, buttons=["copy"]
        )  # fmt: skip

    def add_writing_tab(self, click_options: dict[str, Any]) -> None:
        gradio: Any = self.gradio

        def selection_end(event: gradio.SelectData) -> int:  # gradio passes this type of argument
            return int(event.index[1])

        with gradio.Tab("書く"), gradio.Row():
            with gradio.Column(scale=2):
                prompt = gradio.Textbox(
                    "吾輩は猫である。", label="書き出し", lines=3, max_lines=12, max_length=MAX_CHARS, elem_id="prompt"
                )
                with gradio.Row():
                    start = gradio.Button("書く", variant="primary", elem_id="start")
                    more = gradio.Button("続きを書く(選んだ所から、なければ末尾から)", elem_id="more")
                    stop = gradio.Button("止める", variant="stop", elem_id="stop")
                text = self.text_box("本文(直してから続きを書くこともできます)", "text")
                selected = gradio.State(None)
            with gradio.Column(scale=1):
                settings = self.settings_panel()
            running = [
                start.click(self.write, [prompt, *settings], text, **click_options),
                more.click(self.continue_text, [text, selected, *settings], text, **click_options),
            ]
            text.select(selection_end, None, selected, queue=False)
            text.input(lambda: None, None, selected, queue=False)
            stop.click(None, cancels=running)

    def add_comparison_tab(self, click_options: dict[str, Any]) -> None:
        gradio = self.gradio
        with gradio.Tab("くらべる"):
            prompt = gradio.Textbox("吾輩は猫である。", label="書き出し", lines=3, max_length=MAX_CHARS)
            with gradio.Row():
                start = gradio.Button("両方で書く", variant="primary")
                stop = gradio.Button("止める", variant="stop")
            settings, texts = [], []
            with gradio.Row():
                for number, label in enumerate("甲乙"):
                    with gradio.Column():
                        texts.append(self.text_box(label, f"text_{number}"))
                        settings += self.settings_panel(number)
            running = start.click(self.write_both, [prompt, *settings], texts, **click_options)
            stop.click(None, cancels=[running])


def build_page(gradio: Any, config: DemoConfig, names: list[str], load: Callable[[str], LoadedModel]) -> Any:
    """Return the page as gradio.Blocks. `load` gives the model of a checkpoint's name."""
    builder = PageBuilder(gradio, config, names, load)
    click_options = dict(concurrency_id="write", concurrency_limit=config.n_at_once, show_progress="minimal")
    with gradio.Blocks(title="文章を書く", analytics_enabled=False) as page:
        is_vertical = gradio.Checkbox(False, label="縦書き", elem_id="tategaki")
        is_vertical.change(None, is_vertical, None, js=TOGGLE_VERTICAL_JS)
        builder.add_writing_tab(click_options)
        builder.add_comparison_tab(click_options)
    return page


if __name__ == "__main__":
    run_command(DemoConfig, main)
