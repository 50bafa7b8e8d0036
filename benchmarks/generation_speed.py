"""New tokens a second: ours with the cache, in float32 and int8, against transformers' generate, in one process.

All have GPT-2's architecture in the same dimensions, with random weights, a prompt of 32 tokens, 64 new ones, top-k 40,
and no end-of-text. They take turns, in an order that turns too, because the machines are shared. ours is what
inference.py does: a text alone in float32 is written with a draft's guesses; ours_unguessed goes without.

With --exp_dir, a trained model: how often its draft's guesses are right, what int8 costs in bits per character on
--text_path, and the seconds from the command to the first character, in new processes.

    python benchmarks/generation_speed.py --exp_dir quickstart_run --text_path HELDOUT
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from export_truth import load
from machine import read_texts, say, script, versions, write_result
from torch.nn import functional as F

from gpt_model import GPTConfig, GPTModel
from gptkit.evaluation.scoring import score_documents
from gptkit.generation import generate
from gptkit.generation.cpu_linear import prepare_for_generation, quantized_copy
from gptkit.generation.sampling import SamplingSettings
from gptkit.text.tokenizer import encode_prompt

OURS, UNGUESSED, INT8, TRANSFORMERS = "ours", "ours_unguessed", "ours_int8", "transformers"
HOW = SamplingSettings(temperature=1.0, top_k=40)
# Of the last norm, so that as many of the guesses are right as with a trained model, both of which "tokens_a_reading"
# tells: random weights alone make all words nearly as likely, and a guess is seldom as unsure as that.
SURENESS = 250.0  # over the root of the width
Write = Callable[[list[list[int]], int, int], int]  # prompts, how many new tokens each, a seed -> how many came


def random_model(config: GPTConfig) -> GPTModel:
    """Random weights, and a last norm with which a draft guesses as well as a trained model's."""
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    model.final_norm.weight.data.fill_(SURENESS / config.emb_dim**0.5)  # type: ignore[operator,union-attr]
    return model


def ours(model: GPTModel, draft: GPTModel | None, n_guesses: int = generate.N_DRAFT_TOKENS) -> Write:
    def write(prompts: list[list[int]], n_new: int, seed: int) -> int:
        generate.N_DRAFT_TOKENS = n_guesses
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        steps = generate.generate(
            model, prompts, HOW, max_new_tokens=n_new, context_length=model.config.context_length, end_of_text_id=-1,
            banned_ids=(), generators=generators, draft=draft,
        )  # fmt: skip
        return sum(len(new) for new in steps)

    return write


def transformers(config: GPTConfig) -> Write:
    from transformers import GPT2Config, GPT2LMHeadModel

    dimensions = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_embd=config.emb_dim,
        n_layer=config.n_layers,
        n_head=config.n_heads,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(dimensions).eval()

    def write(prompts: list[list[int]], n_new: int, seed: int) -> int:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=HOW.top_k, max_new_tokens=n_new, min_new_tokens=n_new,
            pad_token_id=0,
        )  # fmt: skip
        return int(found.numel() - ids.numel())

    return write


def random_prompts(vocab_size: int, batch_size: int, n_prompt: int, seed: int) -> list[list[int]]:
    found: list[list[int]] = torch.randint(
        vocab_size, (batch_size, n_prompt), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


def measure(contenders: dict[str, Write], options: argparse.Namespace, batch_size: int) -> dict[str, list[float]]:
    """Tokens a second of each contender, round by round; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(options.n_rounds + 1):
        prompts = random_prompts(options.vocab_size, batch_size, options.n_prompt, seed=i)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            n_tokens = contenders[name](prompts, options.n_new, i)
            assert n_tokens == batch_size * options.n_new, name
            if i:
                found[name].append(n_tokens / (time.perf_counter() - start))
        say(f"batch {batch_size}, round {i}: " + ", ".join(f"{n} {v[-1]:.1f}" for n, v in found.items() if v))
    return found


def cost_of_int8(exp_dir: Path, text_path: Path) -> dict[str, dict[str, float]]:
    """What a trained model loses by int8: bits per character, and nats a token where it reads token by token.

    The one is by whole windows; the other, of the first windows of the text, by the product of a single row.
    """
    model, tokenizer = load(exp_dir)
    works, context_length = read_texts(text_path), model.config.context_length
    n_ids = 8 * context_length
    windows = torch.tensor(tokenizer.encode("".join(works)[: 4 * n_ids])[:n_ids]).view(-1, context_length)
    found: dict[str, dict[str, float]] = {"bits_per_char": {}, "nats_a_token_one_by_one": {}}
    for name, scored in ((OURS, model), (INT8, quantized_copy(model))):
        score = score_documents(scored, tokenizer, works, context_length)
        found["bits_per_char"][name] = round(score.bits_per_char, 5)
        with torch.inference_mode():
            losses = [one_by_one(scored, window) for window in windows]
        found["nats_a_token_one_by_one"][name] = round(statistics.mean(losses), 5)
    return found


def one_by_one(model: GPTModel, ids: torch.Tensor) -> float:
    """Mean loss of a window's ids (T,), each read alone, in nats a token."""
    cache = model.new_cache(1, len(ids))
    logits = torch.cat([model.extend(ids[None, n : n + 1], cache, n) for n in range(len(ids) - 1)])
    return F.cross_entropy(logits, ids[1:]).item()


def tokens_a_reading(
    model: GPTModel, draft: GPTModel, prompt: list[int], how: SamplingSettings, banned_ids: Iterable[int] = ()
) -> float:
    """Tokens written each time the model reads what its draft has guessed: at most one more than there are guesses."""
    n_tokens = 0
    with mock.patch.object(model, "extend", wraps=model.extend) as reading:
        for seed in range(15):
            steps = generate.generate(
                model, [prompt], how, max_new_tokens=100, context_length=model.config.context_length, end_of_text_id=-1,
                banned_ids=banned_ids, generators=[torch.Generator().manual_seed(seed)], draft=draft,
            )  # fmt: skip
            n_tokens += sum(1 for _ in steps) - 1  # the first one follows the prompt's own reading
    return round(n_tokens / reading.call_count, 2)


def tokens_a_reading_of_trained(exp_dir: Path) -> dict[str, float]:
    model, tokenizer = load(exp_dir)
    draft, prompt = quantized_copy(model), encode_prompt(tokenizer, "雨が")
    return {
        f"temperature {how.temperature}, top-k {how.top_k}": tokens_a_reading(
            model, draft, prompt, how, tokenizer.never_generated
        )
        for how in (SamplingSettings(temperature=0), SamplingSettings(), HOW)
    }


def first_character_s(exp_dir: Path, n_times: int) -> list[float]:
    """From the command to the first character that is the model's."""
    command = script("inference.py", exp_dir=exp_dir, prompt="雨", max_new_tokens=20, device="cpu")
    found = []
    for _ in range(n_times):
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
            assert process.stdout
            process.stdout.read(len("雨".encode()) + 1)
            found.append(round(time.perf_counter() - start, 2))
            process.stdout.read()
    return found


def import_torch_s(n_times: int) -> list[float]:
    found = []
    for _ in range(n_times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        found.append(round(time.perf_counter() - start, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="New tokens a second, against transformers' generate")
    parser.add_argument("--n_layers", type=int, default=12)
    parser.add_argument("--emb_dim", type=int, default=768)
    parser.add_argument("--n_heads", type=int, default=12)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--context_length", type=int, default=1024)
    parser.add_argument("--n_prompt", type=int, default=32)
    parser.add_argument("--n_new", type=int, default=64)
    parser.add_argument("--n_rounds", type=int, default=5)
    parser.add_argument("--exp_dir", type=Path, help="an experiment with a trained model")
    parser.add_argument("--text_path", type=Path, help="JSONL of works, to measure that model on")
    options = parser.parse_args()
    config = GPTConfig(
        options.vocab_size, options.context_length, options.emb_dim, options.n_layers, options.n_heads, arch="gpt2"
    )
    model = random_model(config)
    n_parameters = model.n_parameters()
    int8 = quantized_copy(model)
    draft = prepare_for_generation(model, with_draft=True)
    contenders = {
        OURS: ours(model, draft),
        UNGUESSED: ours(model, None),
        INT8: ours(int8, None),
        TRANSFORMERS: transformers(config),
    }
    result: dict[str, Any] = {"size": f"{config.n_layers}x{config.emb_dim}", "vocab_size": config.vocab_size}
    result |= {"n_parameters": n_parameters, "versions": versions("torch", "transformers")}
    result["prompt_and_new_tokens"] = [options.n_prompt, options.n_new]
    result["tokens_a_reading"] = {}
    if draft:
        prompt = random_prompts(options.vocab_size, 1, options.n_prompt, seed=0)[0]
        for name, sureness in (("random weights as they are", 1.0), ("random weights", SURENESS / config.emb_dim**0.5)):
            model.final_norm.weight.data.fill_(sureness)  # type: ignore[operator,union-attr]
            result["tokens_a_reading"][name] = tokens_a_reading(model, draft, prompt, HOW)
    goals: dict[str, bool] = {}
    for batch_size, least in ((1, 2.0), (8, 1.5)):
        if batch_size > 1:
            contenders.pop(UNGUESSED)  # a batch has no guesses
        rounds = measure(contenders, options, batch_size)
        speed = {name: statistics.median(values) for name, values in rounds.items()}
        ratio = {
            "ours_to_transformers": round(speed[OURS] / speed[TRANSFORMERS], 2),
            "int8_to_ours": round(speed[INT8] / speed[OURS], 2),
        }
        by_round = [mine / theirs for mine, theirs in zip(rounds[OURS], rounds[TRANSFORMERS], strict=True)]
        ratio["ours_to_transformers_by_round"] = round(statistics.median(by_round), 2)
        result[f"batch_{batch_size}"] = {
            "median_tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
            **ratio,
            "rounds": {name: [round(value, 1) for value in values] for name, values in rounds.items()},
        }
        goals[f"batch {batch_size}: at least {least} times transformers"] = ratio["ours_to_transformers"] >= least
        if batch_size == 1:
            goals["int8 at least 2 times float32"] = ratio["int8_to_ours"] >= 2
            goals["int8 at least 2 times float32 without guesses"] = speed[INT8] >= 2 * speed[UNGUESSED]
    if options.exp_dir:
        result["tokens_a_reading"] |= tokens_a_reading_of_trained(options.exp_dir)
        result["first_character_s"] = first_character_s(options.exp_dir, options.n_rounds)
        result["import_torch_s"] = import_torch_s(options.n_rounds)  # the most of it
        goals["first character in less than 3 s"] = statistics.median(result["first_character_s"]) < 3
        if options.text_path:
            costs = cost_of_int8(options.exp_dir, options.text_path)
            result |= costs
            goals["int8: at most 1 % more bits per character"] = all(
                cost[INT8] <= 1.01 * cost[OURS] for cost in costs.values()
            )
    write_result("generation_speed", json.loads(json.dumps(result)) | {"goals": goals})


if __name__ == "__main__":
    main()
