"""Read text by one rule for its line ends, and recognise what is no UTF-8 text: archives, pages, other encodings.

This is a copy of dataset/_formats.py: the scripts in dataset/ import nothing from gptkit, and a test compares
the two. Whether an error is raised is left to those who read the files.
"""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

HEAD_BYTES = 1 << 20  # of a file or a line, read to recognise what it is

SIGNATURES: tuple[tuple[int, bytes, str], ...] = (  # offset, bytes, what begins so and the remedy
    (0, b"PK\x03\x04", "a zip archive; unpack it (unzip) and name the file in it"),
    (0, b"PK\x05\x06", "an empty zip archive; download it again"),
    (0, b"\x1f\x8b", "compressed by gzip; unpack it (gunzip)"),
    (0, b"\xfd7zXZ\x00", "compressed by xz; unpack it (unxz)"),
    (4, b"1AY&SY", "compressed by bzip2; unpack it (bunzip2)"),
    (0, b"\x28\xb5\x2f\xfd", "compressed by zstd; unpack it (unzstd)"),
    (0, b"\x04\x22\x4d\x18", "compressed by lz4; unpack it (unlz4)"),
    (0, b"\x1f\x9d", "compressed by compress; unpack it (gunzip)"),
    (0, b"\x5d\x00\x00", "compressed by lzma; unpack it (unlzma)"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it (7z x) and name the file in it"),
    (0, b"Rar!\x1a\x07", "a rar archive; unpack it (unrar x) and name the file in it"),
    (2, b"-lh5-", "an lzh archive; unpack it (lha x) and name the file in it"),
    (257, b"ustar", "a tar archive; unpack it (tar -xf) and name the file in it"),
    (0, b"\x89PNG", "a picture and no text; name a file of UTF-8 text"),
    (0, b"\xff\xd8\xff", "a picture and no text; name a file of UTF-8 text"),
    (0, b"%PDF-", "a PDF; extract its text (pdftotext)"),
    (0, b"{\\rtf", "an RTF document; save it as plain text in UTF-8"),
    (0, b"\xd0\xcf\x11\xe0", "a document of Microsoft Office; save it as plain text in UTF-8"),
    (0, b"PAR1\x15", "a Parquet file; convert it to JSONL (pandas: read_parquet(…).to_json(…, orient='records', lines=True))"),
    (0, b"ARROW1", "an Arrow file; convert it to JSONL (datasets: Dataset.from_file(…).to_json(…))"),
    (0, b"\xff\xff\xff\xff", "an Arrow file; convert it to JSONL (datasets: Dataset.from_file(…).to_json(…))"),
    (0, b"SQLite format 3\0", "an SQLite database; export its text"),
    (0, b"version https://git-lfs.github.com/spec/", "a pointer of Git LFS and not the file itself; fetch that (git lfs pull)"),
)  # fmt: skip

# Codec of Python, what people call the encoding, its name for iconv. CP932 contains Shift_JIS.
WIDE = (
    ("utf-16-le", "UTF-16 (little-endian)", "UTF-16LE"),
    ("utf-16-be", "UTF-16 (big-endian)", "UTF-16BE"),
    ("utf-32-le", "UTF-32 (little-endian)", "UTF-32LE"),
    ("utf-32-be", "UTF-32 (big-endian)", "UTF-32BE"),
)
JAPANESE = (
    ("iso2022_jp_ext", "ISO-2022-JP (JIS)", "ISO-2022-JP"),
    ("euc_jp", "EUC-JP", "EUC-JP"),
    ("shift_jis", "Shift_JIS", "SHIFT_JIS"),
    ("cp932", "Shift_JIS (Windows' CP932)", "CP932"),
)
BYTE_ORDER_MARKS = (  # that of UTF-16-LE begins UTF-32-LE's
    (codecs.BOM_UTF32_LE, "UTF-32", "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32", "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16", "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16", "UTF-16"),
)
KANA = re.compile("[ぁ-んァ-ヶ]")
UNUSUAL = re.compile("[^\t\n\r -~\u2010-\u30ff\u4e00-\u9fff\uff00-\uff60]")  # in Japanese text; half-width kana too
CONTROL = re.compile(rb"[\0-\x08\x0e-\x1a]")
CARRIAGE_RETURN_LINES = re.compile(rb"\}[ \t]*\r[ \t]*\{")
MAX_UNUSUAL = 1 / 20  # share of the characters that are not ASCII


def plain_text(text: str, is_beginning: bool = True) -> str:
    """Return a document, or a part of one, with \\n for each \\r\\n and \\r, and no byte-order mark at the beginning.

    The other line ends of Unicode (U+2028, U+2029, U+0085, \\v, \\f) are characters like others.
    """
    text = text.removeprefix("\ufeff") if is_beginning else text
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def other_in_file(path: Path) -> str | None:
    """Describe what a file is, as other_than_utf8 does, by its beginning."""
    with open(path, "rb") as file:
        return other_than_utf8(file.read(HEAD_BYTES))


def by_signature(data: bytes) -> str | None:
    """Describe the format whose signature a file begins with, and the remedy; None where it has none of those here."""
    return next((name for offset, magic, name in SIGNATURES if data.startswith(magic, offset)), None)


def other_than_utf8(data: bytes) -> str | None:
    """Describe in what format or encoding a file or line begins, with the remedy; None where it may be UTF-8 text."""
    found = by_signature(data)
    if found:
        return found
    data = data[:HEAD_BYTES]
    for mark, name, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _in_encoding(name, encoding)
    candidates: Sequence[tuple[str, str, str]] = WIDE if b"\0" in data else JAPANESE
    if _is_utf8(data):  # so may be what is 7-bit, or ASCII characters of two bytes
        candidates = candidates if b"\0" in data else JAPANESE[:1] if b"\x1b" in data else ()
    elif _is_damaged_utf8(data):
        return None
    shares = {candidate: _unusual_share(data, candidate[0]) for candidate in candidates}
    if shares and min(shares.values()) <= MAX_UNUSUAL:
        codec, name, encoding = min(shares, key=lambda candidate: shares[candidate])
        # As Shift_JIS, iconv reads "\" as "¥", which ends an escape of JSON, and "~" as "‾".
        return _in_encoding(name, "CP932" if codec == "shift_jis" and (b"\\" in data or b"~" in data) else encoding)
    is_binary = CONTROL.search(data) is not None and not _is_utf8(data)
    if is_binary:
        return "binary data and no text; name a file of UTF-8 text"
    if not _is_utf8(data):
        return "not UTF-8, and of no encoding known here; convert the file to UTF-8 (from Windows: iconv -f CP932 -t UTF-8)"
    return None


def other_than_jsonl(line: bytes) -> str | None:
    """Describe what a file is whose first line is no JSON object, with the remedy; None where it may be JSONL."""
    begin = line[:HEAD_BYTES].strip()[:100].lower()
    if begin.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "an HTML or XML page; download the file itself, not the page about it"
    found = other_than_utf8(line)
    if found or not begin:
        return found
    if begin.startswith(b"["):
        return "JSON that begins with a list, and not an object per line; convert it (jq -c '.[]')"
    if CARRIAGE_RETURN_LINES.search(line, 0, HEAD_BYTES):
        return "JSONL whose lines end in a carriage return alone; convert them (tr '\\r' '\\n')"
    if begin == b"{":
        return "a JSON object over several lines, and not one per line; convert it (jq -c .)"
    if not begin.startswith(b"{") and b"\0" not in begin and _is_utf8(line[:HEAD_BYTES]):
        return "text and not JSONL; a folder of .txt files needs no preparation, give it as --data_dir"
    return None


def _in_encoding(name: str, encoding: str) -> str:
    return f"not UTF-8 but {name}; convert the file to UTF-8 (iconv -f {encoding} -t UTF-8)"


def _decode(data: bytes, codec: str, errors: str = "strict") -> str:
    """Decode data whose last character may be cut off."""
    return codecs.getincrementaldecoder(codec)(errors).decode(data)


def _is_utf8(data: bytes) -> bool:
    try:
        _decode(data, "utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_damaged_utf8(data: bytes) -> bool:
    """Return whether most of what is not ASCII is Japanese in UTF-8: another encoding would give random characters."""
    text = _decode(data, "utf-8", "replace")
    return bool(KANA.search(text)) and text.count("\ufffd") * 2 < sum(character > "\x7f" for character in text)


def _unusual_share(data: bytes, codec: str) -> float:
    """Return the share of what is unusual in Japanese text, if data is decoded so; 1 where it cannot be."""
    try:
        text = _decode(data, codec)
    except UnicodeDecodeError:
        return 1.0
    counted = text if codec.startswith("utf") else [character for character in text if character > "\x7f"]
    if not counted or not (codec.startswith("utf") or KANA.search(text)):
        return 1.0
    return len(UNUSUAL.findall(text)) / len(counted)
