"""Check that what export_hf.py writes is the model: transformers and llama.cpp read it, and are compared with ours.

transformers runs in an environment with nothing else of ours: --python names its interpreter (by default this one).
llama.cpp is tried where llama-cpp-python and gguf are installed here.

    python benchmarks/checks/export_truth.py --exp_dir EXP_MODERN EXP_GPT2 --text_path HELDOUT [--python FRESH/bin/python]
"""

import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
import torch
from machine import log, read_texts, run, script, versions, write_result
from models import load_experiment

from gpt_model import GPTModel
from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.paths import existing_path
from gptkit.generation.generate import generate
from gptkit.generation.sampling import SamplingSettings
from gptkit.interop.gguf import refuse_unreadable
from gptkit.text.tokenizer import Tokenizer

N_GREEDY, N_CHARACTERS = 50, 20_000
MOST_LOGIT_ERROR = 1e-4
# Reads a folder by transformers alone; its task comes as JSON on standard input.
THEIRS = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
asked = json.load(sys.stdin)
model, tokenizer = AutoModelForCausalLM.from_pretrained(asked["folder"]).eval(), AutoTokenizer.from_pretrained(asked["folder"])
ids = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in asked["lines"]]
prompt = tokenizer(asked["prompt"], return_tensors="pt")["input_ids"]
with torch.inference_mode():
    logits = model(torch.tensor([asked["window"]])).logits[0]
    written = model.generate(prompt, do_sample=False, max_new_tokens=asked["n_greedy"])[0, prompt.shape[1]:]
torch.save(logits, asked["logits"])
print(json.dumps({"ids": ids, "prompt": prompt[0].tolist(), "written": written.tolist()}))
"""


@dataclass(frozen=True, kw_only=True)
class ExportTruthConfig:
    """Check what export_hf.py writes, read by transformers and llama.cpp."""

    exp_dir: tuple[str, ...] = setting(help="experiments with trained models")
    text_path: tuple[str, ...] = setting(help="JSONL of documents")
    n_lines: int = setting(10_000, "lines whose ids are compared", at_least=1)
    python: str = setting(sys.executable, "of an environment with transformers alone")


def main(config: ExportTruthConfig) -> None:
    paths = [existing_path(path, "--text_path") for path in config.text_path]
    exp_dirs = [existing_path(exp_dir, "--exp_dir") for exp_dir in config.exp_dir]
    documents = [document for path in paths for document in read_texts(path)]
    lines = [line for document in documents for line in document.split("\n") if line][: config.n_lines]
    result: dict[str, Any] = {"versions": versions("transformers", "tokenizers", "torch")}
    goals: dict[str, bool] = {}
    for exp_dir in exp_dirs:
        model, tokenizer = load_experiment(str(exp_dir))
        name = f"{exp_dir.name} ({model.config.arch})"
        with tempfile.TemporaryDirectory() as folder:
            result[name], reached = against_transformers(exp_dir, lines, config.python, Path(folder))
            goals |= {f"{name}: {goal}": value for goal, value in reached.items()}
            try:
                import llama_cpp
            except ImportError:
                log("llama-cpp-python is not installed: llama.cpp is not tried")
                continue
            try:
                refuse_unreadable(tokenizer)
            except UserError as error:
                log(str(error))
                continue
            result["versions"]["llama_cpp_python"] = llama_cpp.__version__
            for kind in ("f16", "q8_0"):
                found, reached = against_llama_cpp(exp_dir, "".join(documents)[:N_CHARACTERS], Path(folder), kind)
                result[f"{name}, {kind}"] = found
                goals |= {f"{name}, {goal}": value for goal, value in reached.items()}
    write_result("export_truth", result | {"goals": goals})


def greedy(model: GPTModel, tokenizer: Tokenizer, prompt: list[int], banned: frozenset[int]) -> list[int]:
    """Return the most likely continuation of a prompt, at most N_GREEDY ids."""
    steps = generate(
        model, [prompt], SamplingSettings(temperature=0), max_new_tokens=N_GREEDY, banned_ids=banned,
        context_length=model.config.context_length, end_of_text_id=tokenizer.end_of_text_id, generators=[torch.Generator()],
    )  # fmt: skip
    return [new[0] for new in steps if new[0] is not None]


def against_transformers(
    exp_dir: Path, lines: list[str], python: str, folder: Path
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Export to transformers' form; return its differences from ours, and the goals."""
    model, tokenizer = load_experiment(str(exp_dir))
    run(script("export_hf.py", exp_dir=exp_dir, output_dir=folder / "hf"))
    ours = [tokenizer.encode(line) for line in lines]
    end = tokenizer.end_of_text_id
    window = [end, *[i for ids in ours for i in ids]][: model.config.context_length]
    asked = {
        "folder": str(folder / "hf"), "lines": lines, "prompt": "吾輩は", "window": window, "n_greedy": N_GREEDY,
        "logits": str(folder / "logits.pt"),
    }  # fmt: skip
    result = subprocess.run([python, "-c", THEIRS], input=json.dumps(asked), capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {python} could not read the folder\n{result.stderr}")
    theirs = json.loads(result.stdout)
    with torch.inference_mode():
        logits = model(torch.tensor([window]))[0, :, : tokenizer.vocab_size]
    error = (torch.load(folder / "logits.pt", weights_only=True) - logits).abs().max().item()
    n_different = sum(a != b for a, b in zip(ours, theirs["ids"], strict=True))
    written = greedy(model, tokenizer, [end, *tokenizer.encode("吾輩は")], tokenizer.never_generated)
    found = {
        "lines": len(lines),
        "lines_with_other_ids": n_different,
        "largest_difference_of_logits": error,
        "greedy_tokens_equal": theirs["written"][: len(written)] == written,
        "prompt_equal": theirs["prompt"] == [end, *tokenizer.encode("吾輩は")],
    }
    log(f"{exp_dir} by transformers: {found}")
    goals = {
        "logits within 1e-4": error < MOST_LOGIT_ERROR,
        "the same greedy text": found["greedy_tokens_equal"] and found["prompt_equal"],
        "the same ids": n_different == 0,
    }
    return found, goals


def against_llama_cpp(exp_dir: Path, text: str, folder: Path, kind: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """Export to GGUF; return llama.cpp's differences from ours, and the goals."""
    from llama_cpp import Llama

    model, tokenizer = load_experiment(str(exp_dir))
    run(script("export_hf.py", exp_dir=exp_dir, output_dir=folder / kind, format="gguf", gguf_type=kind))
    n_context, end = model.config.context_length, tokenizer.end_of_text_id
    llama = Llama(str(folder / kind / f"model-{kind}.gguf"), n_ctx=n_context, logits_all=True, verbose=False)
    ids = tokenizer.encode(text)
    nats = {"ours": 0.0, "llama_cpp": 0.0}
    for start in range(0, len(ids), n_context - 1):
        window = [end, *ids[start : start + n_context - 1]]
        targets = torch.tensor(window[1:])
        llama.reset()
        llama.eval(window)
        with torch.inference_mode():
            ours = model(torch.tensor([window]))[0, :, : tokenizer.vocab_size]
        logits = {"ours": ours, "llama_cpp": torch.from_numpy(llama.scores[: len(window)].copy())}
        for name, values in logits.items():
            nats[name] += torch.nn.functional.cross_entropy(values[:-1], targets, reduction="sum").item()
    perplexity = {name: math.exp(total / len(ids)) for name, total in nats.items()}
    prompt = [end, *tokenizer.encode("吾輩は")]
    written = greedy(model, tokenizer, prompt, frozenset())
    llama.reset()
    theirs: list[int] = []
    for new in llama.generate(prompt, temp=0.0, top_k=1, repeat_penalty=1.0):
        if new == end or len(theirs) == N_GREEDY:
            break
        theirs.append(new)
    found = {
        "characters": len(text),
        "ids_equal": llama.tokenize(text.encode(), add_bos=False) == ids,
        "perplexity": perplexity,
        "greedy_tokens": len(written),
        "greedy_tokens_equal": theirs == written,
    }
    log(f"{exp_dir} by llama.cpp, {kind}: {found}")
    goals = {
        f"{kind}: perplexity within 1 %": abs(perplexity["llama_cpp"] / perplexity["ours"] - 1) < 0.01,
        f"{kind}: the first {N_GREEDY} greedy tokens equal": theirs == written,
    }
    return found, goals


if __name__ == "__main__":
    run_command(ExportTruthConfig, main)
