"""Measure what dropout costs a micro-step of training on this CPU: torch's and ours, eager and compiled, in turns.

Behind gptkit/training/dropout.py.

    python benchmarks/dropout_cost.py
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from machine import log, versions, write_result

from gpt_model import PRESETS, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import run_command, setting
from gptkit.training.compilation import Loss, compile_and_time
from gptkit.training.dropout import quicken_dropout

NONE, TORCH, OURS = "none", "torch's", "ours"
N_WARM_UP = 2  # micro-steps of each before those that count


@dataclass(frozen=True, kw_only=True)
class DropoutCostConfig:
    """Measure what dropout costs a micro-step of training on this CPU."""

    size: Literal["nano", "micro", "tiny", "mini", "midi"] = setting("mini", "the model")
    threads: int = setting(2, "threads that compute", at_least=1)
    drop_rate: float = setting(0.1, "dropout", at_least=0, less_than=1)
    vocab_size: int = setting(4096, "tokens of the vocabulary", at_least=1)
    batch_tokens: int = setting(4096, "tokens of a micro-step", at_least=1)
    n_rounds: int = setting(10, "micro-steps of each", at_least=1)


def main(config: DropoutCostConfig) -> None:
    torch.set_num_threads(config.threads)
    device = torch.device("cpu")
    devices.keep_freed_memory(device)
    dtype = devices.choose_dtype("auto", device, training=True)
    preset: dict[str, Any] = PRESETS[config.size]
    n_sequences = max(config.batch_tokens // preset["context_length"], 1)
    ids = torch.randint(config.vocab_size, (n_sequences, preset["context_length"] + 1))
    batch = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    losses: dict[tuple[str, str], tuple[GPTModel, Loss]] = {}
    for kind in (NONE, TORCH, OURS):
        for compiled in (False, True):
            rate = 0.0 if kind == NONE else config.drop_rate
            dimensions = GPTConfig(config.vocab_size, arch="modern", drop_attention=False, drop_rate=rate, **preset)
            model = GPTModel(dimensions).train()
            if kind == OURS:
                quicken_dropout(model)
            loss, _ = compile_and_time(model, config.vocab_size, compiled, batch, device, dtype)
            losses["compiled" if compiled else "eager", kind] = model, loss
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in losses}
    for i in range(N_WARM_UP + config.n_rounds):
        for key in list(losses)[:: 1 if i % 2 else -1]:
            model, loss = losses[key]
            began = time.perf_counter()
            with devices.autocast(device, dtype):
                loss(*batch).backward()
            seconds[key].append(time.perf_counter() - began)
            model.zero_grad(set_to_none=True)
    medians = {key: statistics.median(each[N_WARM_UP:]) for key, each in seconds.items()}
    found = {
        how: {kind: round(medians[how, kind], 4) for kind in (NONE, TORCH, OURS)}
        | {
            f"{kind}, times as long as none": round(medians[how, kind] / medians[how, NONE], 3)
            for kind in (TORCH, OURS)
        }
        for how in ("eager", "compiled")
    }
    log(str(found))
    conditions = {name: getattr(config, name) for name in ("size", "threads", "drop_rate", "batch_tokens")}
    write_result(
        "dropout_cost", {**conditions, "dtype": devices.dtype_name(dtype), "micro_step_s": found, **versions("torch")}
    )


if __name__ == "__main__":
    run_command(DropoutCostConfig, main)
