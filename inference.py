"""Write with a trained GPT: an experiment folder and a prompt in, text on standard output.

    python inference.py --exp_dir exp001 --prompt "吾輩は猫である。名前は" --max_new_tokens 200

Needs the checkpoint alone: no network, no dataset. All but the text goes to standard error.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from gpt_model import GPTConfig, GPTModel
from gptkit import checkpoints, devices
from gptkit.command_line import UserError, existing_path, run_command, setting
from gptkit.generation import generate
from gptkit.tokenization import Tokenizer, load_saved


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Write with a trained GPT."""

    exp_dir: str = setting(help="experiment folder (or the folder of checkpoints in it)")
    prompt: str = setting(help="how the text begins")
    max_new_tokens: int = setting(200, "most tokens to write", at_least=1)
    temperature: float = setting(0.8, "0 takes the likeliest token; higher is bolder", at_least=0)
    top_k: int | None = setting(None, "draw from the k likeliest tokens only", at_least=1)
    seed: int | None = setting(
        None, "the same seed gives the same text (default: another text each time)", at_least=0, at_most=2**63 - 1
    )
    checkpoint: Literal["newest", "best"] = setting("newest", "best: the one with the lowest validation loss")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")


def main(config: InferenceConfig) -> None:
    try:
        device = devices.choose_device(config.device)
    except ValueError as error:
        raise UserError(str(error))
    folder = choose_checkpoint(config)
    tokenizer = load_saved(folder / "tokenizer")
    prompt = encode_prompt(config.prompt, tokenizer)
    model = load_model(folder, device)
    context_length = model.config.context_length
    if len(prompt) > context_length:
        raise UserError(f"--prompt is {len(prompt)} tokens and the model sees {context_length}; give a shorter prompt")
    print(f"{folder}: {model.n_parameters():,} parameters on {devices.describe_device(device)}", file=sys.stderr)
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    start = time.monotonic()
    new = list(
        generate(
            model,
            prompt,
            max_new_tokens=config.max_new_tokens,
            context_length=context_length,
            temperature=config.temperature,
            top_k=config.top_k,
            end_of_text_id=tokenizer.end_of_text_id,
            banned_ids=tokenizer.never_written,
            generator=generator,
        )
    )
    print(config.prompt + tokenizer.decode_continuation(prompt, new))
    print(f"{len(new)} tokens, {len(new) / (time.monotonic() - start):.1f} tokens/s", file=sys.stderr)


def choose_checkpoint(config: InferenceConfig) -> Path:
    """The checkpoint folder meant: in exp_dir itself, or in one folder below it. Raises UserError."""
    exp_dir = existing_path(config.exp_dir, "--exp_dir")
    if (exp_dir / checkpoints.STATE_FILE).is_file():  # one checkpoint, by name
        return exp_dir
    runs = {folder: checkpoints.find_checkpoints(folder) for folder in [exp_dir, *sorted(exp_dir.glob("*/"))]}
    runs = {folder: found for folder, found in runs.items() if found}
    if not runs:
        raise UserError(
            f"--exp_dir {exp_dir} holds no checkpoint (step_…); pretraining.py writes one every --save_ckpt_freq steps"
        )
    if len(runs) > 1:
        raise UserError(f"--exp_dir {exp_dir} holds several runs; name one: {', '.join(map(str, runs))}")
    (found,) = runs.values()
    return found[-1] if config.checkpoint == "newest" else checkpoints.best_checkpoint(found)


def load_model(folder: Path, device: torch.device) -> GPTModel:
    """The model of a checkpoint. Raises UserError."""
    try:
        model = GPTModel(GPTConfig(**checkpoints.read_state(folder)["identity"]["model"]))
        model.load_state_dict(checkpoints.read_tensors(folder, checkpoints.MODEL_FILE, torch.device("cpu")))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{folder} is damaged or from another version ({reason}); use another checkpoint")
    return model.to(device)


def encode_prompt(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """End-of-text, which stood before each work in training, and the prompt's ids. Raises UserError."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"--prompt {prompt!a} is not valid text; give it in UTF-8")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"--prompt {prompt!r} holds no text for this tokenizer; give a beginning, such as 吾輩は")
    n_unknown = ids.count(tokenizer.unknown_id) if tokenizer.unknown_id is not None else 0
    if n_unknown:
        print(f"note: {n_unknown} of the prompt's {len(ids)} tokens are unknown to the tokenizer", file=sys.stderr)
    return [tokenizer.end_of_text_id, *ids]


if __name__ == "__main__":
    run_command(InferenceConfig, main)
