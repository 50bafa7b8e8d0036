"""Write with a trained GPT: an experiment folder and a prompt in, text on standard output.

    python inference.py --exp_dir exp001 --prompt "吾輩は猫である。名前は" --max_new_tokens 200

Needs the checkpoint alone: no network, no dataset. All but the text goes to standard error.
"""

import sys
import time
from dataclasses import dataclass

import torch

from gpt_model import GPTConfig, GPTModel
from gptkit import checkpoints, devices
from gptkit.command_line import UserError, run_command, setting
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
    checkpoint: checkpoints.Choice = setting("newest", "best: the one with the lowest validation loss")
    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps")


def main(config: InferenceConfig) -> None:
    try:
        device = devices.choose_device(config.device)
    except ValueError as error:
        raise UserError(str(error))
    folder = checkpoints.choose_checkpoint(config.exp_dir, config.checkpoint)
    tokenizer = load_saved(folder / "tokenizer")
    prompt = encode_prompt(config.prompt, tokenizer)
    model = checkpoints.load_model(folder, lambda model: GPTModel(GPTConfig(**model)), device)
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
