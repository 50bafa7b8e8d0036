"""Fetch the Japanese texts that the README trains on: aozorabunko-dedupe-clean.jsonl, into this folder.

They are the dataset globis-university/aozorabunko-clean of the Hugging Face hub (CC BY 4.0) at one fixed revision.
A download that was cut off is resumed; size and sha256 must be those that the hub reports. An archive that exists is
used without a network too, and then only its own checksum is checked. `--help` and every error name the address for
fetching the file by hand.
"""

from _startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below

import gzip
import hashlib
import io
import os
import re
import shutil
import sys
import time
import zlib
from pathlib import Path
from typing import Any

from _locks import file_lock
from _script import Parser, UserError, log, probe_files, run_script, sync

REPOSITORY = "globis-university/aozorabunko-clean"
REVISION = "42a9c9c0f1d67e6a5554d9bea4201973dc9b049c"
ARCHIVE = "aozorabunko-dedupe-clean.jsonl.gz"
URL = f"https://huggingface.co/datasets/{REPOSITORY}/resolve/{REVISION}/{ARCHIVE}"
BY_HAND = f"fetch {URL} by hand and unpack it there with gunzip -k"
MB = 1_000_000


class ReportingFile(io.BufferedWriter):
    """The file that is downloaded. Where no terminal shows the hub's bar, it prints a line for every tenth."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        super().__init__(open(path, "ab", buffering=0))
        self.n_bytes, self.n_before, self.start = n_bytes, self.tell(), time.monotonic()

    def write(self, chunk: Any) -> int:
        before = self.tell()
        super().write(chunk)
        if before * 10 // self.n_bytes < self.tell() * 10 // self.n_bytes and not sys.stderr.isatty():
            rate = max(self.tell() - self.n_before, 1) / max(time.monotonic() - self.start, 1e-9)
            left_s = (self.n_bytes - self.tell()) / rate
            log(f"{self.tell() / MB:.0f} of {self.n_bytes / MB:.0f} MB, {rate / MB:.1f} MB/s, {left_s:.0f} s left")
        return len(chunk)


def download(archive: Path) -> None:
    """Download the hub's file to `archive`, or check the one that exists. Raises UserError."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # we report an error ourselves, once
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HTTPError
    except ImportError:
        raise UserError(f"huggingface_hub is not installed; pip install -r requirements.txt, or {BY_HAND}")
    url = hf_hub_url(REPOSITORY, ARCHIVE, repo_type="dataset", revision=REVISION)  # at HF_ENDPOINT, if that is set
    path = archive if archive.exists() else archive.with_name(f"{ARCHIVE}.partial")
    try:
        expected = get_hf_file_metadata(url)  # its etag is the sha256, as with every large file
        if expected.size is None or not re.fullmatch("[0-9a-f]{64}", expected.etag or ""):
            raise UserError(f"{url}: no size and sha256 to check the file with; unset HF_ENDPOINT, or {BY_HAND}")
        if path != archive:
            append(url, path, expected.size)
    except KeyboardInterrupt:
        raise UserError("interrupted; run the same command to resume")
    except (HTTPError, OSError) as error:
        if getattr(error, "errno", None):
            raise  # an error of the disk, not of the network
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if path == archive:
            log(f"{archive} exists and is used without comparing it with the hub's: {reason}")
            return
        raise UserError(f"{url}: {reason}; check the network and run the same command to resume, or {BY_HAND}")
    size, sha256 = path.stat().st_size, sha256_of(path)
    if (size, sha256) != (expected.size, expected.etag):
        path.unlink()
        of_hub = f"the hub reports {expected.size} bytes and {expected.etag}"
        raise UserError(f"{path}: {size} bytes with sha256 {sha256}, but {of_hub}; removed, run this again")
    path.replace(archive)


def append(url: str, partial: Path, n_bytes: int) -> None:
    """Fetch the rest of `partial`. (hf_hub_download of version 2.4 would throw an unfinished file away.)"""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    with ReportingFile(partial, n_bytes) as file:
        if file.tell() < n_bytes:
            http_get(url, file, resume_size=file.tell(), headers=build_hf_headers(), expected_size=n_bytes)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(MB):
            digest.update(chunk)
    return digest.hexdigest()


def unpack(archive: Path, target: Path) -> None:
    """Decompress `archive` to `target`, which exists only when it is complete. Raises UserError."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        with gzip.open(archive) as source, open(partial, "wb") as file:
            shutil.copyfileobj(source, file, MB)
            sync(file)
        partial.replace(target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run this again, or {BY_HAND}")
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = Parser(f"Fetch the texts of Aozora Bunko from the Hugging Face hub. Or {BY_HAND}.")
    parser.add_argument("--output_dir", default=str(Path(__file__).resolve().parent), help="the folder (dataset/)")
    parser.add_argument("--no_unpack", action="store_true", help="keep it a .gz, which prepare_aozora_jsonl.py reads")
    arguments = parser.parse_args()
    folder = Path(arguments.output_dir)
    archive, target = folder / ARCHIVE, folder / ARCHIVE.removesuffix(".gz")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder")
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder / f".{ARCHIVE}.lock"):
            fetch(archive, target, arguments.no_unpack)
        return
    print(f"{target} exists already; nothing to do")


def fetch(archive: Path, target: Path, no_unpack: bool) -> None:
    """Download the archive and unpack it to `target`, in a folder that this process has locked. Raises UserError."""
    if target.exists():  # made by the command that this one waited for
        print(f"{target} exists already; nothing to do")
        return
    probe_files(target.parent)
    download(archive)
    if no_unpack:
        target = archive
    else:
        unpack(archive, target)
    print(f"{target}: {target.stat().st_size} bytes; prepare_aozora_jsonl.py reads it")


if __name__ == "__main__":
    run_script(main)
