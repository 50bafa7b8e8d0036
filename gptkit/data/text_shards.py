import codecs
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptkit.base.cli import UserError
from gptkit.base.files import read_json, sha256_of

TEXT_FORMAT = "gptkit-text-shards"
DEFAULT_SEPARATOR = "<|endoftext|>"
SELF_CHECK_CHARS = 200_000  # characters of the corpus on which a tokenizer is tried before tokens are written


@dataclass(frozen=True)
class TextShards:
    """A folder of text shards. continues[i]: the last work of shard i goes on in shard i + 1."""

    paths: list[Path]
    continues: list[bool]
    separator: str
    sha256: list[str | None]  # as the manifest has it; None: no manifest
    by_hand: bool = False  # no manifest: files that people put there


def find_text_shards(data_dir: Path) -> TextShards:
    """The shards of prepare_aozora_jsonl.py, or all .txt files, each file's end ending a work. Raises UserError."""
    if not data_dir.is_dir():
        raise UserError(f"--data_dir {data_dir} is a file; name the folder of text shards")
    if (data_dir / "manifest.json").exists():
        try:
            manifest = read_json(data_dir / "manifest.json")
            if manifest["format"] != TEXT_FORMAT:
                raise ValueError(f"its format is {manifest['format']}, not {TEXT_FORMAT}")
            shards = manifest["shards"]
            found = TextShards(
                [data_dir / Path(shard["file"]).name for shard in shards],
                [bool(shard["continues"]) for shard in shards],
                str(manifest["separator"]),
                [shard.get("sha256") for shard in shards],
            )
            found.separator.encode()  # a lone surrogate is in no UTF-8 text
            missing = [path.name for path in found.paths if not path.is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{data_dir / 'manifest.json'} describes no text shards ({error!r}); prepare the folder again"
            )
        if missing:
            raise UserError(f"{data_dir} lacks {missing[0]}, which its manifest names; prepare the folder again")
    else:
        if (data_dir / ".partial").exists():
            raise UserError(f"{data_dir} is what a preparation left that was stopped; prepare the folder again")
        paths = sorted(path for path in data_dir.glob("*.txt") if path.is_file())
        found = TextShards(paths, [False] * len(paths), DEFAULT_SEPARATOR, [None] * len(paths), by_hand=True)
    if not found.paths or not found.separator:
        raise UserError(f"{data_dir} holds no text shards (*.txt); dataset/prepare_aozora_jsonl.py makes them")
    return found


def source_name(data_dir: Path) -> str | None:
    """The name of the file that text shards were made from, where it is known."""
    try:
        return str(read_json(data_dir / "manifest.json")["source"]["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sample_documents(data_dir: Path, max_chars: int) -> list[str]:
    """Works drawn evenly over the shards, the first ones of each, cut to about max_chars characters in all."""
    text = find_text_shards(data_dir)
    chosen = []
    for index in range(len(text.paths)):
        left = max_chars // len(text.paths)
        for work in documents_of_shard(text, index):
            if left <= 0:
                break
            chosen.append(work[:left])
            left -= len(work)
    return chosen


def documents_of_shard(text: TextShards, index: int) -> Iterator[str]:
    """The works that begin in shard `index`, in order; the last one read on into the next shards where it goes on.

    Of files that people put there, a byte-order mark and the \\r of a line's end are no part of the text.
    """
    return (work.decode() for work in _encoded_documents(text, index))


def _encoded_documents(text: TextShards, index: int) -> Iterator[bytes]:
    """works_of_shard, each found to be UTF-8 but still encoded."""
    separator = text.separator.encode()
    content = text.paths[index].read_bytes()
    if text.by_hand:
        content = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n")
    if index > 0 and text.continues[index - 1]:  # the first piece belongs to an earlier shard
        content = content.partition(separator)[2]
        if not content:
            return
    for path in shards_read_with(text, index)[1:]:
        rest, ended, _ = path.read_bytes().partition(separator)
        content += rest
        if ended:
            break
    start = 0
    while start < len(content):  # one work at a time: a split would hold them all a second time
        end = content.find(separator, start)
        end = len(content) if end < 0 else end
        work, start = content[start:end], end + len(separator)
        try:
            blank = not work.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{text.paths[index]}: not UTF-8 ({error.reason}); convert the file to UTF-8")
        if not blank:
            yield work


def shards_read_with(text: TextShards, index: int) -> list[Path]:
    """Shard `index`, and those after it that a work of it may reach into."""
    last = index
    while text.continues[last] and last + 1 < len(text.paths):
        last += 1
    return text.paths[index : last + 1]


def hash_document(work: bytes) -> int:
    return int.from_bytes(hashlib.sha256(work).digest()[:8], "big")


def survey_shard(text: TextShards, index: int) -> tuple[str, list[int]]:
    """(sha256 of shard `index`, hashes of the works that begin in it). Raises UserError where it is not UTF-8."""
    return sha256_of(text.paths[index]), [hash_document(work) for work in _encoded_documents(text, index)]


def validation_threshold(text: TextShards, work_hashes: Iterable[int], val_fraction: float) -> int:
    """Works whose hash is below it are for validation: about val_fraction of them, and always at least one.

    Raises UserError where no work is left to train on.
    """
    hashes = sorted(work_hashes)
    if len(set(hashes)) < 2:
        raise UserError(
            f"{text.paths[0].parent} holds {len(set(hashes))} work(s); at least 2 are needed, one for validation"
        )
    threshold = max(int(val_fraction * 2**64), hashes[0] + 1)
    if hashes[-1] < threshold:
        raise UserError(f"--val_fraction {val_fraction} leaves no work to train on; give a smaller one")
    return threshold
