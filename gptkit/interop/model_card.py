"""Write the README.md of an exported model: what it is, what it was trained on, how good it is, how to use it."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkit.base.files import as_dict
from gptkit.training.run_log import METRICS_FILE, as_number, read_jsonl, read_run_config

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATASET, FILE_PREFIX = "globis-university/aozorabunko-clean", "aozorabunko-"  # the hub's name, and how its files begin
LICENCE = f"""
その文章は [{DATASET}](https://huggingface.co/datasets/{DATASET})（[青空文庫](https://www.aozora.gr.jp/)から作られた、CC BY 4.0 のデータセット）のものです。
The text is that of the dataset, made from Aozora Bunko, under CC BY 4.0.
"""


def model_card(
    run_folder: Path, state: dict[str, Any], model: Any, tokenizer: "Tokenizer", samples: list[str], is_averaged: bool
) -> str:
    """Return the card of a checkpoint with that state, in Japanese and English, with generated samples.

    is_averaged: the model has the averaged weights. Facts that the run's folder does not hold are left out.
    """
    run = read_run_config(run_folder)
    settings = as_dict(run.get("settings"))
    data = " ".join(str(run.get("tokens", "unknown")).partition(";")[0].split())  # without the tokenizer's path
    is_aozora = str(run.get("text")).startswith(FILE_PREFIX)
    dataset, licence = (f"license: cc-by-4.0\ndatasets:\n- {DATASET}\n", LICENCE) if is_aozora else ("", "")
    base_line, base_note = _describe_base(str(settings.get("init_from") or ""))
    figures = _key_figures(run_folder, state["step"], model, tokenizer, is_averaged)
    figures["最適化 / optimizer"] = settings.get("optimizer")
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items() if value)
    quotes = "\n\n".join("> " + text.replace("\n", "\n> ") for text in samples)
    return f"""---
language: ja
library_name: transformers
pipeline_tag: text-generation
{dataset}{base_line}---

# 日本語の文章で学習した GPT

文章の続きを書くモデルです。A GPT that continues Japanese text.

学習した文章 / Trained on: {data}
{base_note}{licence}
| | |
|---|---|
{table}

検証損失は、学習に使わなかった作品のものです。The validation loss is on works that were not trained on.

## 使い方 / Use

```python
from transformers import pipeline

write = pipeline("text-generation", "このフォルダー、またはリポジトリの名前")
print(write("吾輩は")[0]["generated_text"])
```

文章は学習のときと同じく `{tokenizer.end_of_text}` で始まります（トークナイザーが付けます）。A text begins with
`{tokenizer.end_of_text}`, as in training; the tokenizer puts it there.

## 見本 / Samples

temperature 0.8, top-k 40:

{quotes}

## 限界 / Limits

書かれることは事実とは限りません。古い文章から学んだ、今日では差別的とされる表現を書くことがあります。
What it writes need not be true, and may use the offensive words of old texts.
"""


def _key_figures(
    run_folder: Path, step: int, model: Any, tokenizer: "Tokenizer", is_averaged: bool
) -> dict[str, str | None]:
    """Return the size of the model, and how long and how well it was trained up to `step`; None for unknown values."""
    metrics = [record for record in read_jsonl(run_folder / METRICS_FILE) if record["step"] <= step]
    last = metrics[-1] if metrics else {}
    n_tokens = as_number(last.get("tokens"))
    loss = as_number(last.get("averaged_val_loss" if is_averaged else "val_loss"))
    return {
        "パラメーター / parameters": f"{model.n_parameters():,}",
        "形 / form": "GPT-2" if model.config.arch == "gpt2" else "Qwen3",
        "層 x 幅 / layers x width": f"{model.config.n_layers} x {model.config.emb_dim}",
        "文脈 / context": f"{model.config.context_length:,} tokens",
        "語彙 / vocabulary": f"{tokenizer.vocab_size:,}",
        "学習ステップ / steps": f"{step:,}",
        "学習トークン / training tokens": f"{n_tokens:,.0f}" if n_tokens else None,
        "検証損失 / validation loss": f"{loss:.4f} nats/token" if loss else None,
        "パープレキシティ / perplexity": f"{math.exp(loss):.2f}" if loss and loss < 100 else None,
        "重み / weights": "指数移動平均 / exponential moving average" if is_averaged else None,
    }


def _describe_base(base: str) -> tuple[str, str]:
    """Return the metadata line and the sentence about the model that training started from; both empty without one."""
    if not base:
        return "", ""
    note = "\nほかのモデルの重みから始めました。It began with the weights of another model"
    if HUB_NAME.fullmatch(base) is None or Path(base).exists():  # a folder's path is not published
        return "", f"{note}."
    return f"base_model: {base}\n", f"{note}: [{base}](https://huggingface.co/{base})."
