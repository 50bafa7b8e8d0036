"""gptkit/data/token_shards.py: the format on disk, and shards read as one array."""

from pathlib import Path

import numpy as np
import pytest

from gptkit.data.token_shards import Tokens, TokenStream, open_token_shard, token_dtype, token_shard_bytes


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, "uint16"), (65_535, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_smallest_type_that_holds_every_id(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype
    assert np.iinfo(dtype).max >= vocab_size - 1


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_shard_comes_back_from_disk_little_endian(tmp_path: Path, dtype: str, order: str) -> None:
    tokens = np.array([0, 1, 258, np.iinfo(dtype).max], np.dtype(dtype).newbyteorder(order))
    path = tmp_path / "train_a.npy"
    path.write_bytes(token_shard_bytes(tokens))
    opened = open_token_shard(path, dtype, 4)
    assert isinstance(opened, np.memmap)
    assert opened.tolist() == tokens.tolist()
    n_bytes = 4 * np.dtype(dtype).itemsize
    expected = b"".join(int(token).to_bytes(np.dtype(dtype).itemsize, "little") for token in tokens)
    assert path.read_bytes()[-n_bytes:] == expected
    assert np.load(path).tolist() == tokens.tolist()  # NumPy's own reader


def test_an_empty_shard_can_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "val_a.npy"
    path.write_bytes(token_shard_bytes(np.empty(0, np.uint16)))
    assert len(open_token_shard(path, "uint16", 0)) == 0


def test_a_file_that_is_not_the_shard_named_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train_a.npy"
    content = token_shard_bytes(np.arange(100, dtype=np.uint16))
    two_dimensions = token_shard_bytes(np.zeros((10, 10), np.uint16))
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}] * 100), allow_pickle=True)
    wrong = [b"", b"no array", content[:-1], content[:20], two_dimensions, objects.read_bytes()]
    for damaged in wrong:
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train_a\.npy: not "):
            open_token_shard(path, "uint16", 100)
    path.write_bytes(content)
    for dtype, n_tokens in [("uint16", 99), ("uint16", 101), ("uint32", 100)]:
        with pytest.raises(ValueError, match=f"the {n_tokens} tokens of {dtype}"):
            open_token_shard(path, dtype, n_tokens)
    with pytest.raises(ValueError, match="not a token shard"):
        open_token_shard(tmp_path / "missing.npy", "uint16", 100)


@pytest.mark.parametrize("lengths", [[10], [3, 4, 3], [0, 3, 0, 0, 7, 0], [1] * 10, [10, 0]])
def test_any_stretch_of_a_stream_equals_that_of_one_array(lengths: list[int]) -> None:
    row = np.array([7, 1, 65_535, 3, 2, 9, 0, 5, 4, 8], np.uint16)
    stream = TokenStream(np.split(row, np.cumsum(lengths)[:-1]))
    assert len(stream) == 10
    for start in range(11):
        for length in range(11 - start):
            found = stream.read(start, length)
            assert found.dtype == np.int64
            assert found.tolist() == row[start : start + length].tolist()
    for places in (np.array([[9, 0, 4], [4, 3, 7]]), np.arange(10)[::-1], np.empty((2, 0), np.int64)):
        found = stream.read_at(places)
        assert found.dtype == np.int64
        assert found.tolist() == row[places].tolist()


def test_a_stretch_beyond_the_stream_is_refused() -> None:
    stream = TokenStream([np.arange(5, dtype=np.uint16)])
    for start, length in [(-1, 2), (0, 6), (5, 1), (6, 0)]:
        with pytest.raises(IndexError, match="of 5"):
            stream.read(start, length)
    for places in ([-1, 0], [3, 5]):
        with pytest.raises(IndexError, match="of 5"):
            stream.read_at(np.array(places))
    assert len(TokenStream([])) == 0


def test_a_shard_is_opened_when_it_is_read_and_not_again() -> None:
    opened = []

    def open_shard(number: int) -> Tokens:
        opened.append(number)
        return np.arange(4 * number, 4 * number + 4, dtype=np.uint16)

    stream = TokenStream.lazy([4] * 5, open_shard)
    assert (len(stream), opened) == (20, [])
    assert stream.read(6, 4).tolist() == [6, 7, 8, 9]
    assert stream.read(4, 6).tolist() == [4, 5, 6, 7, 8, 9]
    assert stream.read_at(np.array([9, 4])).tolist() == [9, 4]
    assert opened == [1, 2]
    assert stream.read(19, 1, np.uint16).dtype == np.uint16
