"""Measure new tokens per second: ours with the cache, in float32 and int8, against transformers' generate, in one process.

All have GPT-2's architecture in the same dimensions, with random weights, a prompt of 32 tokens, 64 new ones, top-k 40,
and no end-of-text. They take turns in an order that rotates, because the machines are shared. ours is what inference.py
does: in float32 a single text is generated with a draft model; ours_unguessed does without one.

With --exp_dir, for a trained model: how many draft tokens are accepted, what int8 costs in bits per character on
--text_path, and the seconds from the command to the first character, in new processes.

    python benchmarks/generation_speed.py --exp_dir quickstart_run --text_path HELDOUT
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import log, read_texts, script, versions, write_result
from models import load_experiment, make_config
from torch.nn import functional as F

from gpt_model import GPTConfig, GPTModel
from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path
from gptkit.evaluation.scoring import score_documents
from gptkit.generation import generate
from gptkit.generation.cpu_linear import prepare_for_generation, quantized_copy
from gptkit.generation.sampling import SamplingSettings
from gptkit.text.tokenizer import encode_prompt

OURS, UNGUESSED, INT8, TRANSFORMERS = "ours", "ours_unguessed", "ours_int8", "transformers"
SAMPLING = SamplingSettings(temperature=1.0, top_k=40)
# The weight of the last norm with which as many draft tokens are accepted as with a trained model ("tokens_a_reading"
# has both figures): random weights alone make all tokens nearly as likely, and a draft is seldom that unsure.
SURENESS = 250.0  # over the root of the width
Generate = Callable[[list[list[int]], int, int], int]  # prompts, new tokens for each, seed -> tokens that came


@dataclass(frozen=True, kw_only=True)
class GenerationSpeedConfig:
    """Measure new tokens per second, against transformers' generate."""

    n_layers: int = setting(12, "blocks", group="model")
    emb_dim: int = setting(768, "width", group="model")
    n_heads: int = setting(12, "attention heads", group="model")
    vocab_size: int = setting(32_000, "tokens of the vocabulary", group="model")
    context_length: int = setting(1024, "tokens that the model sees at once", group="model")
    n_prompt: int = setting(32, "tokens of each prompt", at_least=1, group="measurement")
    n_new: int = setting(64, "new tokens for each prompt", at_least=1, group="measurement")
    n_rounds: int = setting(5, "rounds, of which the median counts", at_least=1, group="measurement")
    exp_dir: str | None = setting(None, "an experiment with a trained model", group="trained model")
    text_path: str | None = setting(None, "JSONL of documents, to evaluate that model on", group="trained model")


def main(config: GenerationSpeedConfig) -> None:
    text_path = existing_path(config.text_path, "--text_path") if config.text_path else None
    if config.exp_dir:
        existing_path(config.exp_dir, "--exp_dir")
    result, goals = measure_random(config)
    if config.exp_dir:
        result["tokens_a_reading"] |= tokens_per_pass_of_trained(config.exp_dir)
        result["first_character_s"] = first_character_s(config.exp_dir, config.n_rounds)
        result["import_torch_s"] = import_torch_s(config.n_rounds)  # most of that time
        goals["first character in less than 3 s"] = statistics.median(result["first_character_s"]) < 3
        if text_path:
            costs = cost_of_int8(config.exp_dir, text_path)
            result |= costs
            goals["int8: at most 1 % more bits per character"] = all(
                cost[INT8] <= 1.01 * cost[OURS] for cost in costs.values()
            )
    write_result("generation_speed", result | {"goals": goals})


def measure_random(config: GenerationSpeedConfig) -> tuple[dict[str, Any], dict[str, bool]]:
    """Measure models with random weights; return the figures and the goals."""
    dimensions = make_config(
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        emb_dim=config.emb_dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        arch="gpt2",
    )
    model = random_model(dimensions)
    result: dict[str, Any] = {
        "size": f"{config.n_layers}x{config.emb_dim}",
        "vocab_size": config.vocab_size,
        "n_parameters": model.n_parameters(),
        "versions": versions("torch", "transformers"),
        "prompt_and_new_tokens": [config.n_prompt, config.n_new],
        "tokens_a_reading": {},
    }
    int8 = quantized_copy(model)
    draft = prepare_for_generation(model, with_draft=True)
    contenders = {
        OURS: ours(model, draft),
        UNGUESSED: ours(model, None),
        INT8: ours(int8, None),
        TRANSFORMERS: transformers(dimensions),
    }
    if draft:
        prompt = random_prompts(config.vocab_size, 1, config.n_prompt, seed=0)[0]
        sureness = SURENESS / config.emb_dim**0.5
        for name, weight in (("random weights as they are", 1.0), ("random weights", sureness)):
            model.final_norm.weight.data.fill_(weight)  # type: ignore[operator,union-attr]
            result["tokens_a_reading"][name] = tokens_per_pass(model, draft, prompt, SAMPLING)
    goals: dict[str, bool] = {}
    for batch_size, least in ((1, 2.0), (8, 1.5)):
        if batch_size > 1:
            contenders.pop(UNGUESSED)  # a batch has no draft
        rounds = measure(contenders, batch_size, config.n_prompt, config.n_new, config.vocab_size, config.n_rounds)
        found, reached = summarize(rounds, batch_size, least)
        result[f"batch_{batch_size}"] = found
        goals |= reached
    return result, goals


def measure(
    contenders: dict[str, Generate], batch_size: int, n_prompt: int, n_new: int, vocab_size: int, n_rounds: int
) -> dict[str, list[float]]:
    """Return the tokens/s of each contender, round by round; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(n_rounds + 1):
        prompts = random_prompts(vocab_size, batch_size, n_prompt, seed=i)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            n_tokens = contenders[name](prompts, n_new, i)
            assert n_tokens == batch_size * n_new, name
            if i:
                found[name].append(n_tokens / (time.perf_counter() - start))
        log(f"batch {batch_size}, round {i}: " + ", ".join(f"{n} {v[-1]:.1f}" for n, v in found.items() if v))
    return found


def summarize(rounds: dict[str, list[float]], batch_size: int, least: float) -> tuple[dict[str, Any], dict[str, bool]]:
    """Return the medians and ratios of a batch size, and whether ours is at least so many times transformers."""
    speed = {name: statistics.median(values) for name, values in rounds.items()}
    by_round = [mine / theirs for mine, theirs in zip(rounds[OURS], rounds[TRANSFORMERS], strict=True)]
    ratio = {
        "ours_to_transformers": round(speed[OURS] / speed[TRANSFORMERS], 2),
        "int8_to_ours": round(speed[INT8] / speed[OURS], 2),
        "ours_to_transformers_by_round": round(statistics.median(by_round), 2),
    }
    goals = {f"batch {batch_size}: at least {least} times transformers": ratio["ours_to_transformers"] >= least}
    if batch_size == 1:
        goals["int8 at least 2 times float32"] = ratio["int8_to_ours"] >= 2
        goals["int8 at least 2 times float32 without guesses"] = speed[INT8] >= 2 * speed[UNGUESSED]
    found = {
        "median_tokens_per_s": {name: round(value, 1) for name, value in speed.items()},
        **ratio,
        "rounds": {name: [round(value, 1) for value in values] for name, values in rounds.items()},
    }
    return found, goals


def random_model(config: GPTConfig) -> GPTModel:
    """Return a model with random weights and a last norm with which a draft guesses as well as a trained model's."""
    torch.manual_seed(0)
    model = GPTModel(config).eval()
    model.final_norm.weight.data.fill_(SURENESS / config.emb_dim**0.5)  # type: ignore[operator,union-attr]
    return model


def random_prompts(vocab_size: int, batch_size: int, n_prompt: int, seed: int) -> list[list[int]]:
    """Return prompts of random ids."""
    found: list[list[int]] = torch.randint(
        vocab_size, (batch_size, n_prompt), generator=torch.Generator().manual_seed(seed)
    ).tolist()
    return found


def ours(model: GPTModel, draft: GPTModel | None, n_draft_tokens: int = generate.N_DRAFT_TOKENS) -> Generate:
    """Return our generation with that draft as a contender."""

    def generate_tokens(prompts: list[list[int]], n_new: int, seed: int) -> int:
        generate.N_DRAFT_TOKENS = n_draft_tokens
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        steps = generate.generate(
            model, prompts, SAMPLING, max_new_tokens=n_new, context_length=model.config.context_length,
            end_of_text_id=-1, banned_ids=(), generators=generators, draft=draft,
        )  # fmt: skip
        return sum(len(new) for new in steps)

    return generate_tokens


def transformers(config: GPTConfig) -> Generate:
    """Return transformers' generate as a contender."""
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

    def generate_tokens(prompts: list[list[int]], n_new: int, seed: int) -> int:
        torch.manual_seed(seed)
        ids = torch.tensor(prompts)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=SAMPLING.top_k, max_new_tokens=n_new,
            min_new_tokens=n_new, pad_token_id=0,
        )  # fmt: skip
        return int(found.numel() - ids.numel())

    return generate_tokens


def cost_of_int8(exp_dir: str, text_path: Path) -> dict[str, dict[str, float]]:
    """Return what a trained model loses by int8: bits per character, and nats per token where it reads one at a time.

    The first reads full windows; the second reads the first windows of the text by products of a single row.
    """
    model, tokenizer = load_experiment(exp_dir)
    documents, context_length = read_texts(text_path), model.config.context_length
    n_ids = 8 * context_length
    windows = torch.tensor(tokenizer.encode("".join(documents)[: 4 * n_ids])[:n_ids]).view(-1, context_length)
    found: dict[str, dict[str, float]] = {"bits_per_char": {}, "nats_a_token_one_by_one": {}}
    for name, scored in ((OURS, model), (INT8, quantized_copy(model))):
        score = score_documents(scored, tokenizer, documents, context_length)
        found["bits_per_char"][name] = round(score.bits_per_char, 5)
        with torch.inference_mode():
            losses = [loss_one_by_one(scored, window) for window in windows]
        found["nats_a_token_one_by_one"][name] = round(statistics.mean(losses), 5)
    return found


def loss_one_by_one(model: GPTModel, ids: torch.Tensor) -> float:
    """Return the mean loss, in nats per token, of a window's ids (T,), each read alone."""
    cache = model.new_cache(1, len(ids))
    logits = torch.cat([model.extend(ids[None, n : n + 1], cache, n) for n in range(len(ids) - 1)])
    return F.cross_entropy(logits, ids[1:]).item()


def tokens_per_pass(
    model: GPTModel, draft: GPTModel, prompt: list[int], sampling: SamplingSettings, banned_ids: Iterable[int] = ()
) -> float:
    """Return the tokens generated for each pass of the model over its draft's tokens: at most one more than those."""
    n_tokens = 0
    with mock.patch.object(model, "extend", wraps=model.extend) as model_pass:
        for seed in range(15):
            steps = generate.generate(
                model, [prompt], sampling, max_new_tokens=100, context_length=model.config.context_length,
                end_of_text_id=-1, banned_ids=banned_ids, generators=[torch.Generator().manual_seed(seed)], draft=draft,
            )  # fmt: skip
            n_tokens += sum(1 for _ in steps) - 1  # the first one follows the prompt's own pass
    return round(n_tokens / model_pass.call_count, 2)


def tokens_per_pass_of_trained(exp_dir: str) -> dict[str, float]:
    """Return tokens_per_pass of a trained model, for several ways of sampling."""
    model, tokenizer = load_experiment(exp_dir)
    draft, prompt = quantized_copy(model), encode_prompt(tokenizer, "雨が")
    return {
        f"temperature {sampling.temperature}, top-k {sampling.top_k}": tokens_per_pass(
            model, draft, prompt, sampling, tokenizer.never_generated
        )
        for sampling in (SamplingSettings(temperature=0), SamplingSettings(), SAMPLING)
    }


def first_character_s(exp_dir: str, n_times: int) -> list[float]:
    """Return the seconds from the command to the first character that the model wrote."""
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
    """Return the seconds that new processes take to import torch."""
    found = []
    for _ in range(n_times):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        found.append(round(time.perf_counter() - start, 2))
    return found


if __name__ == "__main__":
    run_command(GenerationSpeedConfig, main)
