"""The README.md of an exported model: what it is, what it was trained on, how well it does, how to use it."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptkit.base.files import as_dict, read_json
from gptkit.report.records import as_number
from gptkit.training.run_log import read_jsonl

if TYPE_CHECKING:
    from gptkit.text.tokenizer import Tokenizer


HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DATASET, SOURCE = "globis-university/aozorabunko-clean", "aozorabunko-"  # the hub's name, and how its files begin
LICENCE = f"""
その文章は [{DATASET}](https://huggingface.co/datasets/{DATASET})（[青空文庫](https://www.aozora.gr.jp/)から作られた、CC BY 4.0 のデータセット）のものです。
The text is that of the dataset, made from Aozora Bunko, under CC BY 4.0.
"""


def model_card(run_folder: Path, state: dict[str, Any], model: Any, tokenizer: "Tokenizer", samples: list[str]) -> str:
    """Japanese, then English. What the run's folder does not tell is left out."""
    try:
        run = as_dict(read_json(run_folder / "config.json"))
    except (OSError, ValueError):
        run = {}
    settings = as_dict(run.get("settings"))
    data = " ".join(str(run.get("tokens", "unknown")).partition(";")[0].split())  # not the tokenizer's path
    metrics = [record for record in read_jsonl(run_folder / "metrics.jsonl") if record["step"] <= state["step"]]
    last = metrics[-1] if metrics else {}
    n_tokens, loss = as_number(last.get("tokens")), as_number(last.get("val_loss"))
    is_aozora = str(run.get("text")).startswith(SOURCE)
    base = str(settings.get("init_from") or "")
    is_public = HUB_NAME.fullmatch(base) is not None and not Path(base).exists()  # no folder of this machine
    figures = [
        ("パラメーター / parameters", f"{model.n_parameters():,}"),
        ("形 / form", "GPT-2" if model.config.arch == "gpt2" else "Qwen3"),
        ("層 x 幅 / layers x width", f"{model.config.n_layers} x {model.config.emb_dim}"),
        ("文脈 / context", f"{model.config.context_length:,} tokens"),
        ("語彙 / vocabulary", f"{tokenizer.vocab_size:,}"),
        ("学習ステップ / steps", f"{state['step']:,}"),
        ("学習トークン / training tokens", f"{n_tokens:,.0f}" if n_tokens else None),
        ("検証損失 / validation loss", f"{loss:.4f} nats/token" if loss else None),
        ("パープレキシティ / perplexity", f"{math.exp(loss):.2f}" if loss and loss < 100 else None),
        ("最適化 / optimizer", settings.get("optimizer")),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in figures if value)
    shown = "\n\n".join("> " + text.replace("\n", "\n> ") for text in samples)
    started = f"base_model: {base}\n" if is_public else ""
    began = "\nほかのモデルの重みから始めました。It began with the weights of another model"
    began = began + (f": [{base}](https://huggingface.co/{base})." if is_public else ".") if base else ""
    dataset, licence = (f"license: cc-by-4.0\ndatasets:\n- {DATASET}\n", LICENCE) if is_aozora else ("", "")
    return f"""---
language: ja
library_name: transformers
pipeline_tag: text-generation
{dataset}{started}---

# 日本語の文章で学習した GPT

文章の続きを書くモデルです。A GPT that goes on with Japanese text.

学習した文章 / Trained on: {data}
{began}{licence}
| | |
|---|---|
{table}

検証損失は、学習に使わなかった作品のものです。The validation loss is that of works not trained on.

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

{shown}

## 限界 / Limits

書かれることは事実とは限りません。古い文章から学んだ、今日では差別的とされる表現を書くことがあります。
What it writes need not be true, and may use the offensive words of old texts.
"""
