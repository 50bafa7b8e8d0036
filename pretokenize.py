"""Turn text shards into token shards as a separate step: on a cheap machine, before a GPU is rented.

    python pretokenize.py --data_dir dataset/001 --output_dir dataset/001_pretok --tokenizer hf
    python pretokenize.py --describe --tokenizer hf --data_dir dataset/001

pretraining.py with --use_pretokenized finds these token shards, and tokenizes only what no longer matches.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

import re
import sys
from dataclasses import dataclass
from pathlib import Path

from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.paths import existing_path
from gptkit.data.executors import ExecutorName, available_cores
from gptkit.data.pretokenization import pretokenize, tokenize_missing
from gptkit.data.text_shards import SELF_CHECK_CHARS, find_text_shards, sample_documents
from gptkit.data.token_folder import describe_tokens
from gptkit.data.token_locks import lock_making
from gptkit.text.check import check_tokenizer, describe_tokenizer, raise_on_damage
from gptkit.text.tokenizer import TokenizerSettings, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig(TokenizerSettings):
    """Tokenize text shards: each document is followed by end-of-text, and some are held out for validation."""

    data_dir: str | None = setting(
        None, "folder of text shards (dataset/prepare_aozora_jsonl.py makes it)", group="data"
    )
    output_dir: str | None = setting(
        None, "folder for the token shards; what still matches in it is reused", group="data"
    )
    val_fraction: float = setting(
        0.01, "share of the text held out for validation: documents by a hash", more_than=0, at_most=0.5, group="data"
    )
    describe: bool = setting(
        False, "only describe the tokenizer, and with --data_dir what it does to that text", group="tokenizer"
    )
    num_workers: int | None = setting(None, "parallel processes (default: one per core)", at_least=1, group="workers")
    engine: ExecutorName = setting(
        "local", "local processes, or a Ray cluster whose nodes share the file system", group="workers"
    )
    part: str | None = setting(
        None, "K/N, for a job array: only each N-th shard from the K-th on; run without it at the end", group="workers"
    )


def main(config: PretokenizeConfig) -> None:
    data_dir = None if config.data_dir is None else existing_path(config.data_dir, "--data_dir")
    if config.describe:
        tokenizer = load_tokenizer(config)
        report = None
        if data_dir is not None:
            report = check_tokenizer(tokenizer, sample_documents(data_dir, SELF_CHECK_CHARS))
        print(describe_tokenizer(tokenizer, report))
        return
    if data_dir is None or config.output_dir is None:
        raise UserError("--data_dir and --output_dir are both needed (or --describe)")
    tokenizer = load_tokenizer(config)
    raise_on_damage(tokenizer, sample_documents(data_dir, SELF_CHECK_CHARS), config.accept_problems)
    num_workers = config.num_workers or available_cores()
    output_dir = Path(config.output_dir)
    if config.part is not None:
        text, part = find_text_shards(data_dir.resolve()), read_part(config.part)
        with lock_making(output_dir, is_part=True):
            tokenize_missing(text, output_dir, tokenizer, config.val_fraction, config.engine, num_workers, part)
        print(f"part {config.part} is done; when all are, run the same command without --part", file=sys.stderr)
        return
    with lock_making(output_dir):
        manifest = pretokenize(data_dir, output_dir, tokenizer, config.val_fraction, config.engine, num_workers)
    print(f"{output_dir}: {describe_tokens(manifest)}", file=sys.stderr)


def read_part(part: str) -> tuple[int, int]:
    """Return K and N of "K/N", 1 <= K <= N. Raises UserError."""
    match = re.fullmatch(r"([1-9]\d{0,5})/([1-9]\d{0,5})", part)
    if not match or int(match[1]) > int(match[2]):
        raise UserError(f"--part {part} is not K/N with K from 1 to N, such as 3/8")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    run_command(PretokenizeConfig, main)
