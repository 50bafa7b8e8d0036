"""Export an experiment: a folder that transformers, vLLM and the Hugging Face hub read, or a GGUF file for llama.cpp.

    python export_hf.py --exp_dir exp001 --output_dir hf
    python export_hf.py --exp_dir exp001 --output_dir gguf --format gguf --gguf_type q8_0

The way back, from such a folder to training, is `pretraining.py --init_from`. Before the output folder is made,
transformers' tokenizer is checked on 1,000 lines: an export whose ids differ from those of training is refused.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

import contextlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from gpt_model import GPTModel
from gptkit.base.cli import UserError, one_line, run_command, setting
from gptkit.base.files import is_system_file, read_json, replace_folder
from gptkit.base.locks import file_lock
from gptkit.base.paths import existing_path
from gptkit.evaluation.documents import read_documents
from gptkit.generation.generate import TextStream, stream_text
from gptkit.generation.sampling import SamplingSettings
from gptkit.interop import huggingface, tokenizer_export
from gptkit.interop.gguf import refuse_unreadable, write_gguf
from gptkit.interop.model_card import model_card
from gptkit.text.tokenizer import PROBE, Tokenizer, encode_prompt
from gptkit.training import checkpoints
from gptkit.training.loading import CHOICE_HELP, Choice, checkpoint_name, load_chosen

N_CHECK_LINES = 1000
EXPORT_FILE, EXPORT_FORMAT = "export.json", "gptkit-export"
EXPORTED = (
    EXPORT_FILE, "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
SAMPLE = Path(__file__).parent / "dataset" / "sample" / "sample.jsonl"
PROMPTS = ("吾輩は", "春の夜の")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Export a trained GPT to transformers (as GPT-2 or Qwen3), to the Hugging Face hub, or to llama.cpp (GGUF)."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)", group="checkpoint")
    checkpoint: Choice = setting("averaged", CHOICE_HELP, group="checkpoint")
    output_dir: str = setting(help="folder to write; an earlier export there is replaced", group="output")
    format: Literal["hf", "gguf"] = setting(
        "hf", "hf: a folder for transformers; gguf: one file for llama.cpp", group="output"
    )
    gguf_type: Literal["f32", "f16", "q8_0"] = setting(
        "f16", "with --format gguf: the type that matrices are stored in", group="output"
    )
    text_path: str | None = setting(
        None,
        "check the tokenizer on the lines of this .jsonl or .txt file (default: the sample of the repository)",
        group="tokenizer",
    )
    push_to_hub: str | None = setting(
        None, "also upload the folder to this repository of the hub, such as me/exp001", group="hub"
    )
    private: bool = setting(False, "with --push_to_hub: make the repository private if it is new", group="hub")


def main(config: ExportConfig) -> None:
    if config.private and not config.push_to_hub:
        raise UserError("--private needs --push_to_hub; add that, or leave it out")
    if config.push_to_hub and config.format == "gguf":
        raise UserError("--push_to_hub is for --format hf; upload a GGUF file with `hf upload`")
    target = check_output_dir(Path(config.output_dir)).resolve()
    # Beside the folder, which is replaced as a whole.
    with file_lock(target.with_name(f".{target.name}.lock"), f"writes {config.output_dir}"):
        export(config, check_output_dir(Path(config.output_dir)))


def export(config: ExportConfig, output_dir: Path) -> None:
    """Write the export to output_dir, which nobody else writes, and upload it if that is asked for. Raises UserError."""
    checkpoint, model, tokenizer, is_averaged = load_chosen(
        config.exp_dir, config.checkpoint, GPTModel.from_dimensions, torch.device("cpu")
    )
    model, state = model.eval(), checkpoints.read_state(checkpoint)  # now: a run that trains may remove it soon
    lines = read_check_lines(SAMPLE if config.text_path is None else existing_path(config.text_path, "--text_path"))
    tensors, hf_config = huggingface.to_hf(model.state_dict(), vars(model.config), tokenizer.end_of_text_id)
    with as_user_error(output_dir):  # refused before anything is written
        if config.format == "gguf":
            refuse_unreadable(tokenizer)
        else:
            tokenizer_files = check_tokenizer(tokenizer, model.config.context_length, lines)
    with as_user_error(output_dir), replace_folder(output_dir) as folder:
        if config.format == "gguf":
            write_gguf(folder / f"model-{config.gguf_type}.gguf", tensors, hf_config, tokenizer, config.gguf_type)
        else:
            write_configs(folder, tokenizer, model.config.context_length, hf_config)
            for name, content in tokenizer_files.items():
                (folder / name).write_bytes(content)
            write_weights(folder, tensors)
            samples = generate_samples(model, tokenizer)
            card = model_card(checkpoint.parent, state, model, tokenizer, samples, is_averaged)
            (folder / "README.md").write_text(card, encoding="utf-8")
        source = {"format": EXPORT_FORMAT, "exp_dir": config.exp_dir, "checkpoint": checkpoint.name}
        source |= {"weights": "averaged"} if is_averaged else {}
        write_config(folder / EXPORT_FILE, source)
    source_name = checkpoint_name(checkpoint, is_averaged)
    print(f"written: {output_dir} (of {source_name}, {model.n_parameters():,} parameters)", file=sys.stderr)
    problem = huggingface.torchvision_problem() if config.format == "hf" else None
    if problem:
        print(f"warning: transformers cannot load it as a model in this environment: {problem}", file=sys.stderr)
    if config.push_to_hub:
        upload(output_dir, config.push_to_hub, config.private)


def check_output_dir(folder: Path) -> Path:
    """Return the folder, which the export will replace. Raises UserError unless it is missing, empty or an earlier export."""
    try:
        resolved = folder.resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"--output_dir {folder} cannot be resolved ({error}); name a folder")
    try:
        is_export = read_json(folder / EXPORT_FILE)["format"] == EXPORT_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        is_export = False
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if folder.is_dir() and (Path.cwd().is_relative_to(resolved) or os.path.ismount(resolved)):
        raise UserError(f"--output_dir {folder} is in use as a working directory or a mount; name a folder within it")
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    foreign = [name for name in names if not (is_export and (name in EXPORTED or name.endswith(".gguf")))]
    foreign = [name for name in foreign if not is_system_file(name)]
    if foreign:
        raise UserError(f"--output_dir {folder} holds something else ({foreign[0]}); name a new or empty folder")
    return folder


@contextlib.contextmanager
def as_user_error(output_dir: Path) -> Iterator[None]:
    """Raise UserError where protobuf is missing, or where a library reports a full disk by an error class of its own."""
    try:
        yield
    except ImportError as error:
        if "google" not in str(error):
            raise
        raise UserError(f"to export a SentencePiece tokenizer, protobuf is needed ({error}); pip install protobuf")
    except UnicodeEncodeError:
        raise UserError(
            f"--output_dir {output_dir} has a name that libraries cannot read in this locale; set PYTHONUTF8=1"
        )
    except (SafetensorError, OSError) as error:
        if getattr(error, "errno", None):
            raise
        raise UserError(f"--output_dir {output_dir} could not be written ({error}); make room on the disk")


def read_check_lines(path: Path) -> list[str]:
    """Return the lines to check the tokenizer on: some with many special cases, and the first lines of a text."""
    lines = (line for document in read_documents(path) for line in document.split("\n") if line)
    return [*PROBE.split("\n"), PROBE, *tokenizer_export.NAMES, *itertools.islice(lines, N_CHECK_LINES)]


def check_tokenizer(tokenizer: Tokenizer, context_length: int, lines: list[str]) -> dict[str, bytes]:
    """Return the files of the exported tokenizer by name, after a check on `lines` by transformers' AutoTokenizer.

    Raises UserError where ids or decoded texts differ from those of training.
    """
    files = tokenizer_export.export_tokenizer(tokenizer, context_length)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        different, n_ties = tokenizer_export.compare_tokenizers(tokenizer, Path(folder), lines)
    if n_ties:
        print(
            f"note: {n_ties} of {len(lines)} lines can be split into pieces in two equally likely ways;"
            " transformers splits them in the other way",
            file=sys.stderr,
        )
    if different is not None:
        raise UserError(
            f"transformers would read {different[:60]!r} by the exported tokenizer otherwise than {tokenizer.name} did in"
            f" training, so nothing is written; {tokenizer_export.REMEDY}, or give text that the model is meant to read"
            " with --text_path, if the line is from there"
        )
    return files


def write_configs(folder: Path, tokenizer: Tokenizer, context_length: int, hf_config: dict[str, Any]) -> None:
    """Write the model's configurations: its dimensions, and how it generates."""
    write_config(folder / "config.json", hf_config)
    end, pad = tokenizer.end_of_text_id, tokenizer.backend.id_of(tokenizer_export.pad_token(tokenizer))
    write_config(folder / "generation_config.json", {
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": pad, "do_sample": True, "temperature": 0.8, "top_k": 40,
        "max_new_tokens": min(200, context_length // 2), "suppress_tokens": sorted(tokenizer.never_generated) or None,
    })  # fmt: skip


def write_weights(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write the weights, with the mode of the other files."""
    weights = folder / huggingface.WEIGHTS
    save_file(tensors, weights, metadata={"format": "pt"})
    with contextlib.suppress(OSError):  # safetensors makes a file that only its owner reads; some drives have no modes
        weights.chmod((folder / "config.json").stat().st_mode)


def write_config(path: Path, values: dict[str, Any]) -> None:
    """Write the values that are not None as JSON, in the layout of transformers' own files."""
    given = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(given, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def generate_samples(model: GPTModel, tokenizer: Tokenizer) -> list[str]:
    """Return each of PROMPTS with the model's continuation, for the model card."""
    streams = [TextStream(tokenizer, encode_prompt(tokenizer, prompt), seed) for seed, prompt in enumerate(PROMPTS)]
    samples = list(PROMPTS)
    settings = SamplingSettings(temperature=0.8, top_k=40)
    for row, piece in stream_text(model, streams, settings, 100, model.config.context_length):
        samples[row] += piece
    return samples


def upload(folder: Path, repository: str, private: bool) -> None:
    """Upload the folder to a repository of the hub, which is made if it is missing. Raises UserError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of its HTTP client, which is httpx in older versions and httpx2 in newer ones
        LocalTokenNotFoundError,
        OfflineModeIsEnabled,
    )

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, ignore_patterns=[EXPORT_FILE])
    except (LocalTokenNotFoundError, HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, HTTPError) as error:
        raise UserError(
            f"--push_to_hub {repository}: the folder {folder} is written, but could not be uploaded"
            f" ({one_line(error, max_chars=200)}); log in with `hf auth login` and a token that may write, then run the"
            " same command again"
        )
    print(f"uploaded: {url}", file=sys.stderr)


if __name__ == "__main__":
    run_command(ExportConfig, main)
