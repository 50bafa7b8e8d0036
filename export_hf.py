"""An experiment folder -> a folder that transformers, vLLM and the Hugging Face hub read; or a GGUF file for llama.cpp.

    python export_hf.py --exp_dir exp001 --output_dir hf
    python export_hf.py --exp_dir exp001 --output_dir gguf --format gguf --gguf_type q8_0

The way back, from such a folder to training, is `pretraining.py --init_from`. transformers' tokenizer is
tried on 1,000 lines before anything stands in the output folder: other ids than in training stop the export.
"""

import contextlib
import itertools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt_model import GPTModel
from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.files import read_json, replace_folder
from gptkit.base.paths import existing_path
from gptkit.evaluation.documents import read_documents
from gptkit.generation.generate import TextStream, stream_text
from gptkit.generation.sampling import SamplingSettings
from gptkit.interop import huggingface, tokenizer_export
from gptkit.interop.gguf import write_gguf
from gptkit.interop.model_card import model_card
from gptkit.text.tokenizer import PROBE, Tokenizer, encode_prompt
from gptkit.training import checkpoints

N_LINES = 1000
EXPORT_FILE, EXPORT_FORMAT = "export.json", "gptkit-export"
EXPORTED = (
    EXPORT_FILE, "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
SAMPLE = Path(__file__).parent / "dataset" / "sample" / "sample.jsonl"
PROMPTS = ("吾輩は", "春の夜の")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Give a trained GPT to transformers (GPT-2's or Qwen3's form), to the Hugging Face hub, or to llama.cpp (GGUF)."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)")
    output_dir: str = setting(help="folder to make; an earlier export there is replaced")
    checkpoint: checkpoints.Choice = setting("newest", "best: the one with the lowest validation loss")
    format: Literal["hf", "gguf"] = setting("hf", "hf: a folder for transformers; gguf: one file for llama.cpp")
    gguf_type: Literal["f32", "f16", "q8_0"] = setting("f16", "with gguf: how matrices are stored")
    text_path: str | None = setting(
        None, "try the tokenizer on the lines of this .jsonl or .txt file (default: the sample of the repository)"
    )
    push_to_hub: str | None = setting(None, "and upload the folder to this repository of the hub, such as me/exp001")
    private: bool = setting(False, "with --push_to_hub: a repository that is made for it is a private one")


def main(config: ExportConfig) -> None:
    if config.private and not config.push_to_hub:
        raise UserError("--private goes with --push_to_hub; add that, or leave it out")
    if config.push_to_hub and config.format == "gguf":
        raise UserError("--push_to_hub is for --format hf; upload a GGUF file with `hf upload`")
    output_dir = check_output_dir(Path(config.output_dir))
    folder = checkpoints.choose_checkpoint(config.exp_dir, config.checkpoint)
    model, tokenizer = checkpoints.load_checkpoint(folder, GPTModel.from_dimensions, torch.device("cpu"))
    model = model.eval()
    lines = lines_to_try(existing_path(config.text_path, "--text_path") if config.text_path else SAMPLE)
    tensors, dimensions = huggingface.to_hf(model.state_dict(), vars(model.config), tokenizer.end_of_text_id)
    with as_user_error(output_dir), replace_folder(output_dir) as partial:
        if config.format == "gguf":
            write_gguf(partial / f"model-{config.gguf_type}.gguf", tensors, dimensions, tokenizer, config.gguf_type)
        else:
            write_tokenizer(partial, tokenizer, model.config.context_length, dimensions, lines)
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            (partial / "model.safetensors").chmod((partial / "config.json").stat().st_mode)  # it is made for one user
            card = model_card(
                folder.parent, checkpoints.read_state(folder), model, tokenizer, samples(model, tokenizer)
            )
            (partial / "README.md").write_text(card, encoding="utf-8")
        about = {"format": EXPORT_FORMAT, "exp_dir": config.exp_dir, "checkpoint": folder.name}
        write_json(partial / EXPORT_FILE, about)
    print(f"written: {output_dir} (of {folder}, {model.n_parameters():,} parameters)", file=sys.stderr)
    if config.push_to_hub:
        push(output_dir, config.push_to_hub, config.private)


def check_output_dir(folder: Path) -> Path:
    """The folder, which is replaced whole. Raises UserError where it cannot be, or holds more than an earlier export."""
    try:
        resolved = folder.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"--output_dir {folder} cannot be followed ({error}); name a folder")
    try:
        ours = read_json(folder / EXPORT_FILE)["format"] == EXPORT_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if folder.is_dir() and (Path.cwd().is_relative_to(resolved) or os.path.ismount(resolved)):
        raise UserError(f"--output_dir {folder} is in use as a folder to work in or a mount; name a folder within it")
    found = sorted(os.listdir(folder)) if folder.is_dir() else []
    other = [name for name in found if not ours or not (name in EXPORTED or name.endswith(".gguf"))]
    if other:
        raise UserError(f"--output_dir {folder} holds something else ({other[0]}); name a new or empty folder")
    return folder


@contextlib.contextmanager
def as_user_error(output_dir: Path) -> Iterator[None]:
    """Raises UserError where protobuf is missing, or a library says in its own way that the disk is full."""
    try:
        yield
    except ImportError as error:
        if "google" not in str(error):
            raise
        raise UserError(f"to export a SentencePiece tokenizer, protobuf is needed ({error}); pip install protobuf")
    except (SafetensorError, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"--output_dir {output_dir} could not be written ({error}); make room on the disk")


def lines_to_try(path: Path) -> list[str]:
    """What the tokenizer is tried on: a line with many traps, and the first lines of a text."""
    lines = (line for work in read_documents(path) for line in work.split("\n") if line)
    return [*PROBE.split("\n"), PROBE, *itertools.islice(lines, N_LINES)]


def write_tokenizer(
    to: Path, tokenizer: Tokenizer, context_length: int, dimensions: dict[str, Any], lines: list[str]
) -> None:
    """The tokenizer beside the model's configurations, tried by AutoTokenizer. Raises UserError where ids differ."""
    for name, content in tokenizer_export.export_tokenizer(tokenizer, context_length).items():
        (to / name).write_bytes(content)
    write_json(to / "config.json", dimensions)
    end = tokenizer.end_of_text_id
    write_json(to / "generation_config.json", {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "do_sample": True, "temperature": 0.8, "top_k": 40,
        "max_new_tokens": min(200, context_length // 2), "suppress_tokens": sorted(tokenizer.never_generated) or None,
    })  # fmt: skip
    different, n_ties = tokenizer_export.compare_tokenizers(tokenizer, to, lines)
    if n_ties:
        print(
            f"note: {n_ties} of {len(lines)} lines fall in two equally likely ways into pieces; there in the other one",
            file=sys.stderr,
        )
    if different is not None:
        raise UserError(
            f"the exported tokenizer reads {different[:60]!r} otherwise than the one of training; nothing is written"
            " (give --text_path a text as the model is meant to read)"
        )


def write_json(path: Path, value: dict[str, Any]) -> None:
    shown = {key: item for key, item in value.items() if item is not None}
    path.write_text(json.dumps(shown, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def samples(model: GPTModel, tokenizer: Tokenizer) -> list[str]:
    """What the model writes after PROMPTS, as in the card."""
    texts = [TextStream(tokenizer, encode_prompt(tokenizer, prompt), seed) for seed, prompt in enumerate(PROMPTS)]
    shown = list(PROMPTS)
    for row, piece in stream_text(
        model, texts, SamplingSettings(temperature=0.8, top_k=40), 100, model.config.context_length
    ):
        shown[row] += piece
    return shown


def push(folder: Path, repository: str, private: bool) -> None:
    """Make the repository where it is not there, and upload the folder. Raises UserError."""
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[EXPORT_FILE])
    except (LocalTokenNotFoundError, HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--push_to_hub {repository}: the folder {folder} is written, but could not be uploaded ({reason});"
            " log in with `hf auth login` and a token that may write, then run this again"
        )
    print(f"uploaded: {url}", file=sys.stderr)


if __name__ == "__main__":
    run_command(ExportConfig, main)
