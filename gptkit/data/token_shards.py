"""Read and write token shards, and read many of them as one long array of tokens.

A shard is a NumPy .npy file (magic, version, dtype and count in its header) of one dimension, uint16 or uint32,
little-endian. It is memory-mapped when it is first read, so that opening a corpus of any size costs neither time nor
memory. Where the file system maps no files, each read is a read of the file.
"""

import errno
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptkit.base.cli import warn_once

Tokens = npt.NDArray[np.integer]
UNMAPPED_BLOCK = 4096  # tokens read at a time for those at scattered places
MAX_MAPPED = 256  # shards of a stream mapped at a time: each is one of the files that a process may have open


def token_dtype(vocab_size: int) -> str:
    """Return the smaller type that holds every id below vocab_size: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def token_shard_bytes(tokens: Tokens) -> bytes:
    """Return the content of a shard file that holds `tokens` (uint16 or uint32)."""
    file = io.BytesIO()
    np.save(file, tokens.astype(tokens.dtype.newbyteorder("<"), copy=False), allow_pickle=False)
    return file.getvalue()


HEADER_BYTES = len(token_shard_bytes(np.empty(0, np.uint16)))  # of a shard of any length


def has_size_of(path: Path, n_tokens: int, dtype: str) -> bool:
    """Return whether a file exists and is as long as a shard of so many tokens."""
    return path.is_file() and path.stat().st_size == HEADER_BYTES + n_tokens * np.dtype(dtype).itemsize


class UnmappedShard:
    """The tokens of a shard whose file cannot be mapped into memory: what is asked for is read from the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            self.shape, _, self.dtype = np.lib.format.read_array_header_1_0(file)
            self._start = file.tell()
        if path.stat().st_size < self._start + len(self) * self.dtype.itemsize:
            raise ValueError("it is cut short")

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, part: slice | npt.NDArray[np.int64]) -> Tokens:
        if isinstance(part, np.ndarray):
            found = np.empty(len(part), self.dtype)
            blocks = part // UNMAPPED_BLOCK
            for block in np.unique(blocks):
                here, first = blocks == block, int(block) * UNMAPPED_BLOCK
                found[here] = self[first : first + UNMAPPED_BLOCK][part[here] - first]
            return found
        start, end, _ = part.indices(len(self))
        with open(self._path, "rb") as file:  # anew each time: two threads read
            file.seek(self._start + start * self.dtype.itemsize)
            content = file.read(max(end - start, 0) * self.dtype.itemsize)
        if len(content) < (end - start) * self.dtype.itemsize:
            raise OSError(errno.ESTALE, "it is shorter than it was", str(self._path))
        return np.frombuffer(content, self.dtype)


Shard = Tokens | UnmappedShard


def open_token_shard(path: Path, dtype: str, n_tokens: int) -> Shard:
    """Memory-map the tokens of a shard: (n_tokens,). Where that is refused, warn once, and read them when they are needed.

    Raises ValueError where the file is not what is expected, and OSError where it cannot be read.
    """
    tokens: Shard
    try:
        try:
            tokens = _map(path)
        except OSError as error:
            tokens = UnmappedShard(path)  # raises it again where not the mapping was refused
            what, remedy = (
                f"the file system of {path.parent} cannot map files into memory",
                "copy the folder to a local disk and name it with --pretokenized_dir",
            )
            if error.errno == errno.ENOMEM:
                what, remedy = "this process may map no more files into memory", "raise its limit (ulimit -v)"
            warn_once(
                "map",
                f"{what} ({error.strerror}): tokens are read from the files again and again, which may slow training down;"
                f" {remedy}",
            )
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
        raise ValueError(f"{path}: not a token shard ({error})")
    except Exception as error:  # NumPy's reader of headers raises many kinds for a damaged one
        raise ValueError(f"{path}: not a token shard ({error})")
    is_array = isinstance(tokens, (np.ndarray, UnmappedShard))
    if not is_array or tokens.shape != (n_tokens,) or tokens.dtype != np.dtype(dtype).newbyteorder("<"):
        raise ValueError(f"{path}: not the {n_tokens} tokens of {dtype} that its manifest names")
    return tokens


def _map(path: Path) -> Tokens:
    """Map a .npy file into memory. Raises OSError, and what NumPy raises for another file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    # What FUSE answers for a mount with direct_io, which has private mappings and no shared ones.
    return np.load(path, mmap_mode="c", allow_pickle=False)


class TokenStream:
    """Shards joined end to end, read as one array of len(stream) tokens."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shard: Callable[[int], Shard] = shards.__getitem__
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)  # where each shard ends

    @classmethod
    def lazy(cls, lengths: Sequence[int], open_shard: Callable[[int], Shard]) -> "TokenStream":
        """Return a stream of shards of known lengths, each opened by its number when it is first read."""
        stream = cls([])
        stream._ends = np.cumsum(lengths, dtype=np.int64)
        stream._shard = functools.lru_cache(MAX_MAPPED)(open_shard)
        return stream

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, start: int, length: int, dtype: npt.DTypeLike = np.int64) -> Tokens:
        """Return tokens start … start + length - 1 as a new array; they may lie in several shards."""
        if start < 0 or start + length > len(self):
            raise IndexError(f"tokens {start} to {start + length} of {len(self)}")
        parts = []
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while length > 0:
            inside = start - (int(self._ends[shard - 1]) if shard else 0)
            part = self._shard(shard)[inside : inside + length]
            parts.append(part)
            start, length, shard = start + len(part), length - len(part), shard + 1
        return np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype)

    def read_at(self, places: npt.NDArray[np.int64], dtype: npt.DTypeLike = np.int64) -> Tokens:
        """Return the tokens at some places of the stream, as a new array of the same shape."""
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"tokens {places.min()} to {places.max()} of {len(self)}")
        found = np.empty(places.shape, dtype)
        shards = np.searchsorted(self._ends, places, side="right")
        for shard in np.unique(shards).tolist():
            here = shards == shard
            found[here] = self._shard(shard)[places[here] - (self._ends[shard - 1] if shard else 0)]
        return found
