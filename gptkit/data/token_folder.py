"""Find or make the token shards of a run, and check that they stay the same until its end."""

import sys
from pathlib import Path
from typing import Any

from gptkit.base.cli import UserError
from gptkit.base.files import signature
from gptkit.base.paths import existing_path
from gptkit.data.pretokenization import load_manifest, open_tokens, pretokenize, token_files
from gptkit.data.text_shards import SELF_CHECK_CHARS, sample_documents
from gptkit.data.token_shards import TokenStream
from gptkit.distributed.process_group import main_process
from gptkit.text.check import raise_on_damage
from gptkit.text.tokenizer import Tokenizer


class TokenFolder:
    """A finished folder of token shards that a run reads."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._signature = signature(token_files(folder, manifest))

    @property
    def fingerprint(self) -> str:
        """Return a hash that differs where any token does."""
        fingerprint: str = self.manifest["fingerprint"]
        return fingerprint

    def open(self) -> dict[str, TokenStream]:
        """Return the tokens by split, "train" and "val". Raises UserError where a shard is not what it should be."""
        return open_tokens(self.folder, self.manifest)

    def require_unchanged(self) -> None:
        """Raise UserError where a file has changed since this was made."""
        try:
            is_changed = signature(token_files(self.folder, self.manifest)) != self._signature
        except OSError:
            is_changed = True
        if is_changed:
            raise UserError(
                f"the token shards in {self.folder} changed during the run; restore them and run the same"
                " command to resume from its newest checkpoint"
            )


def token_folder_path(data_dir: str, output_dir: Path, use_pretokenized: bool, pretokenized_dir: str | None) -> Path:
    """Return the folder of a run's token shards: its own, or one that runs share."""
    if not use_pretokenized:
        return output_dir / "tokens"
    text = Path(data_dir) if Path(data_dir).name else Path(data_dir).resolve()
    return Path(pretokenized_dir or text.with_name(f"{text.name}_pretok"))


def describe_tokens(manifest: dict[str, Any]) -> str:
    """Describe a token folder in one line."""
    unknown = manifest["unknown_tokens"]
    share = f" ({unknown / max(manifest['characters'], 1) * 10_000:.1f} per 10,000 characters)" if unknown else ""
    train, val, by = manifest["train"], manifest["val"], manifest["tokenizer"]
    return (
        f"{manifest['documents']:,} documents, {manifest['tokens']:,} tokens ({train['tokens']:,} to train on, {val['tokens']:,}"
        f" for validation), {manifest['characters'] / max(manifest['tokens'], 1):.2f} characters per token,"
        f" {unknown:,} unknown{share}; {by['name']}, {by['vocab_size']:,} ids"
    )


@main_process
def prepare_tokens(
    data_dir: str, folder: Path, tokenizer: Tokenizer, val_fraction: float, accept_problems: bool, *, is_shared: bool
) -> dict[str, Any]:
    """Make `folder` hold the tokens of the text in data_dir, where it does not yet, and return its manifest.

    A shared folder that is finished does without the text. Raises UserError.
    """
    if is_shared and not Path(data_dir).exists() and (folder / "manifest.json").exists():
        manifest = load_manifest(folder, tokenizer)
        print(f"--data_dir {data_dir} is missing: the token shards in {folder} are used as they are", file=sys.stderr)
        return manifest
    text = existing_path(data_dir, "--data_dir")
    raise_on_damage(tokenizer, sample_documents(text, SELF_CHECK_CHARS), accept_problems)
    return pretokenize(text, folder, tokenizer, val_fraction)
