"""Measure what dropout costs a micro-step of training on this CPU: torch's and ours, eager and compiled, in turns.

Behind gptkit/training/dropout.py.

    python benchmarks/dropout_cost.py
"""

import os
import tempfile
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from contenders import median_micro_step_s, random_batch
from machine import log, versions, write_result

from gpt_model import PRESETS, GPTConfig, GPTModel
from gptkit.base import devices
from gptkit.base.cli import run_command, setting
from gptkit.training.compilation import Loss, compile_and_time
from gptkit.training.dropout import quicken_dropout

NONE, TORCH, OURS = "none", "torch's", "ours"


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
    cache = tempfile.TemporaryDirectory()  # removed at the end; what is measured here is not of a run
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache.name
    device = torch.device("cpu")
    devices.keep_freed_memory(device)
    dtype = devices.choose_dtype("auto", device, training=True)
    preset: dict[str, Any] = PRESETS[config.size]
    dimensions = GPTConfig(config.vocab_size, arch="modern", drop_attention=False, **preset)
    batch = random_batch(dimensions, max(config.batch_tokens // dimensions.context_length, 1), device)
    runs: dict[tuple[str, str], tuple[GPTModel, Loss]] = {}
    for kind in (NONE, TORCH, OURS):
        model_config = replace(dimensions, drop_rate=0.0 if kind == NONE else config.drop_rate)
        for compiled in (False, True):
            model = GPTModel(model_config).train()
            if kind == OURS:
                quicken_dropout(model)
            loss, _ = compile_and_time(model, config.vocab_size, compiled, batch, device, dtype)
            runs["compiled" if compiled else "eager", kind] = model, loss
    medians = median_micro_step_s(runs, batch, device, dtype, config.n_rounds)
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
