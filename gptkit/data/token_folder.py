"""Find or make the token shards of a run, and check that they stay the same until its end."""

import contextlib
import sys
from pathlib import Path
from typing import Any

from gptkit.base.cli import UserError
from gptkit.base.files import sha256_of, signature
from gptkit.base.paths import existing_path
from gptkit.data.pretokenization import load_manifest, open_tokens, pretokenize
from gptkit.data.text_shards import SELF_CHECK_CHARS, sample_documents
from gptkit.data.token_locks import lock_making, lock_reading
from gptkit.data.token_records import SPLITS
from gptkit.data.token_shards import TokenStream
from gptkit.distributed.process_group import main_process
from gptkit.text.check import raise_on_damage
from gptkit.text.tokenizer import Tokenizer


class TokenFolder:
    """A finished folder of token shards that a run reads."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        shards = [shard[split] for shard in manifest["shards"] for split in SPLITS]
        self._sha256 = {folder / shard["file"]: shard["sha256"] for shard in shards}
        self._signature = signature(self._sha256)

    @property
    def fingerprint(self) -> str:
        """Return a hash that differs where any token does."""
        fingerprint: str = self.manifest["fingerprint"]
        return fingerprint

    def open(self) -> dict[str, TokenStream]:
        """Return the tokens by split, "train" and "val". Raises UserError where a shard is not what it should be."""
        return open_tokens(self.folder, self.manifest)

    def require_unchanged(self) -> None:
        """Raise UserError where a token has changed since this was made; files with the same tokens may be new ones."""
        try:
            found = signature(self._sha256)
            changed = [new[0] for new, old in zip(found, self._signature, strict=True) if new != old]
            is_changed = any(sha256_of(Path(path)) != self._sha256[Path(path)] for path in changed)
            self._signature = found
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
    data_dir: str,
    folder: Path,
    tokenizer: Tokenizer,
    val_fraction: float,
    accept_problems: bool,
    locks: contextlib.ExitStack,
    *,
    is_shared: bool,
) -> dict[str, Any]:
    """Make `folder` hold the tokens of the text in data_dir, where it does not yet, and return its manifest.

    They stay as they are until `locks` are released. A shared folder that is finished does without the text. Raises
    UserError.
    """
    text = Path(data_dir)
    has_text = not is_shared or text.exists() or not (folder / "manifest.json").exists()
    if has_text:
        text = existing_path(data_dir, "--data_dir")
        raise_on_damage(tokenizer, sample_documents(text, SELF_CHECK_CHARS), accept_problems)
    with lock_making(folder):
        if has_text:
            manifest = pretokenize(text, folder, tokenizer, val_fraction)
        else:
            manifest = load_manifest(folder, tokenizer)
            print(f"--data_dir {text} is missing: the token shards in {folder} are used as they are", file=sys.stderr)
        locks.enter_context(lock_reading(folder))
    return manifest
