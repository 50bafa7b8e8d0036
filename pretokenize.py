"""Text shards -> token shards, alone: on a cheap machine, before a GPU is rented.

    python pretokenize.py --data_dir dataset/001 --output_dir dataset/001_pretok --tokenizer hf

pretraining.py with --use_pretokenized finds what this made, and redoes only what no longer matches.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from gptkit.command_line import existing_path, run_command, setting
from gptkit.engines import EngineName, available_cores
from gptkit.pretokenization import describe_tokens, pretokenize
from gptkit.tokenization import TokenizerSettings, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class PretokenizeConfig(TokenizerSettings):
    """Text shards -> token shards, each work followed by end-of-text, some works kept for validation."""

    data_dir: str = setting(help="folder of text shards (dataset/prepare_aozora_jsonl.py makes it)")
    output_dir: str = setting(help="folder for the token shards; what still matches in it is reused")
    num_workers: int | None = setting(None, "processes side by side (default: one a core)", at_least=1)
    engine: EngineName = setting("local", "local processes, or a Ray cluster whose nodes share the file system")
    val_fraction: float = setting(
        0.01, "share of the works kept for validation, chosen by a hash", more_than=0, at_most=0.5
    )


def main(config: PretokenizeConfig) -> None:
    data_dir = existing_path(config.data_dir, "--data_dir")
    tokenizer = load_tokenizer(config)
    num_workers = config.num_workers or available_cores()
    manifest = pretokenize(
        data_dir, Path(config.output_dir), tokenizer, config.val_fraction, config.engine, num_workers
    )
    print(f"{config.output_dir}: {describe_tokens(manifest)}", file=sys.stderr)


if __name__ == "__main__":
    run_command(PretokenizeConfig, main)
