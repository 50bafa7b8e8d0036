"""dataset/download_aozora.py against a small imitation of the hub on this machine."""

import gzip
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_user_error, call_command, command, reset_signals

SCRIPT = "dataset/download_aozora.py"
REVISION = "42a9c9c0f1d67e6a5554d9bea4201973dc9b049c"
NAME = "aozorabunko-dedupe-clean.jsonl"
PATH = f"/datasets/globis-university/aozorabunko-clean/resolve/{REVISION}/{NAME}.gz"
TEXT = b"".join(b'{"text": "%s"}\n' % hashlib.sha256(bytes([i])).hexdigest().encode() for i in range(200))

CHUNK = 10 * 1024 * 1024  # huggingface_hub writes a download in such pieces
LARGE_TEXT = random.Random(0).randbytes(CHUNK + 100_000)
LARGE_BODY = gzip.compress(LARGE_TEXT, compresslevel=0, mtime=0)


class Hub(ThreadingHTTPServer):
    """A server of one file like the hub: its sha256 and size in the headers, ranges on request."""

    daemon_threads = True
    body = gzip.compress(TEXT, mtime=0)
    described_body = body  # what the headers describe
    hash_name = "sha256"  # sha1 for a file that is not large
    max_sent = 1 << 40  # bytes after which the connection breaks
    fails = False  # describes the file, but does not send it
    hangs = False  # keeps the connection open then, silent

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.ranges: list[str | None] = []  # of each GET
        self.released = threading.Event()


class Request(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        if self.path != PATH:
            return self.send_error(404)
        self.send_response(200)
        self.describe()
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()

    def do_GET(self) -> None:
        if self.path != PATH:
            return self.send_error(404)
        if self.server.fails:
            return self.send_error(500)
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.describe()
        self.send_header("Content-Length", str(len(self.server.body) - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(self.server.body) - 1}/{len(self.server.body)}")
        self.end_headers()
        self.wfile.write(self.server.body[start : start + self.server.max_sent])
        if self.server.hangs:
            self.server.released.wait(30)

    def describe(self) -> None:
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("X-Linked-Size", str(len(self.server.described_body)))
        digest = hashlib.new(self.server.hash_name, self.server.described_body)
        self.send_header("X-Linked-Etag", f'"{digest.hexdigest()}"')

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def settings(endpoint: str, folder: Path, **more: str) -> dict[str, str]:
    """Return all variables of the environment: no token, no proxy and no cache of this machine's user."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": endpoint,
        **more,
    }


def address(hub: Hub) -> str:
    return f"http://127.0.0.1:{hub.server_port}"


def run(endpoint: str, tmp_path: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    arguments = command(SCRIPT, "--output_dir", tmp_path / "data", *flags)
    return subprocess.run(arguments, env=settings(endpoint, tmp_path, **more), capture_output=True, text=True)


def names(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "data").iterdir())


def test_fetches_checks_and_unpacks_and_then_has_nothing_to_do(tmp_path: Path, hub: Hub) -> None:
    result = run(address(hub), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'data' / NAME}: {len(TEXT)} bytes")
    assert re.fullmatch(r"\d+ of \d+ MB, \d+\.\d MB/s, \d+ s left\n", result.stderr)
    assert (tmp_path / "data" / NAME).read_bytes() == TEXT
    assert (tmp_path / "data" / f"{NAME}.gz").read_bytes() == hub.body
    assert names(tmp_path) == [NAME, f"{NAME}.gz"]
    assert hub.ranges == [None]
    before = (tmp_path / "data" / NAME).stat().st_mtime_ns
    again = run("http://127.0.0.1:1", tmp_path)  # no hub there
    assert again.returncode == 0, again.stderr
    assert again.stdout == f"{tmp_path / 'data' / NAME} exists already; nothing to do\n"
    assert (tmp_path / "data" / NAME).stat().st_mtime_ns == before


def test_an_existing_archive_is_checked_and_unpacked(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{NAME}.gz").write_bytes(hub.body)
    assert run(address(hub), tmp_path).returncode == 0
    assert (tmp_path / "data" / NAME).read_bytes() == TEXT
    assert hub.ranges == []


def test_a_broken_connection_is_resumed_where_it_broke(tmp_path: Path, hub: Hub) -> None:
    hub.body = hub.described_body = LARGE_BODY
    hub.max_sent = CHUNK + 1000
    result = run(address(hub), tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / NAME).read_bytes() == LARGE_TEXT
    assert hub.ranges == [None, f"bytes={CHUNK}-"]
    assert all(" MB/s, " in line for line in result.stderr.splitlines())  # no warning


def test_a_hub_that_fails_is_reported(tmp_path: Path, hub: Hub) -> None:
    hub.fails = True
    assert_user_error(
        run(address(hub), tmp_path), PATH, "500", "check the network", "run the same command to resume", "by hand"
    )
    assert names(tmp_path) == [f"{NAME}.gz.partial"]


def test_a_second_run_resumes_where_the_first_was_interrupted(tmp_path: Path, hub: Hub) -> None:
    hub.body = hub.described_body = LARGE_BODY
    hub.max_sent, hub.hangs = CHUNK + 1000, True
    partial = tmp_path / "data" / f"{NAME}.gz.partial"
    partial.parent.mkdir()
    partial.write_bytes(LARGE_BODY[:1000])
    arguments = command(SCRIPT, "--output_dir", partial.parent)
    how: dict[str, Any] = {"env": settings(address(hub), tmp_path), "preexec_fn": reset_signals}
    process = subprocess.Popen(arguments, **how, stderr=subprocess.PIPE, text=True)
    while partial.stat().st_size < CHUNK:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1].endswith("error: interrupted; run the same command to resume\n")
    assert process.returncode == 2
    assert names(tmp_path) == [partial.name]
    hub.hangs = False
    assert run(address(hub), tmp_path).returncode == 0
    assert (tmp_path / "data" / NAME).read_bytes() == LARGE_TEXT
    assert hub.ranges == ["bytes=1000-", f"bytes={1000 + CHUNK}-"]


@pytest.mark.parametrize("already_there", [False, True])
def test_a_file_with_another_hash_is_refused_and_removed(tmp_path: Path, hub: Hub, already_there: bool) -> None:
    hub.body = bytes(len(hub.described_body))
    if already_there:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / f"{NAME}.gz").write_bytes(hub.body)
    expected = hashlib.sha256(hub.described_body).hexdigest()
    found = hashlib.sha256(hub.body).hexdigest()
    assert_user_error(run(address(hub), tmp_path), found, expected, "removed, run this again")
    assert names(tmp_path) == []


def test_a_file_of_another_size_is_refused(tmp_path: Path, hub: Hub) -> None:
    hub.described_body = hub.body + b"more"
    assert_user_error(
        run(address(hub), tmp_path), f"size {len(hub.described_body)}", f"size {len(hub.body)}", "run the same command"
    )
    assert names(tmp_path) == [f"{NAME}.gz.partial"]
    hub.described_body = hub.body[:-4]  # now the unfinished file is larger than the complete one
    assert_user_error(
        run(address(hub), tmp_path), f"{len(hub.body)} bytes", f"{len(hub.described_body)} bytes", "removed"
    )
    assert names(tmp_path) == []


def test_a_hub_without_a_sha256(tmp_path: Path, hub: Hub) -> None:
    hub.hash_name = "sha1"
    assert_user_error(run(address(hub), tmp_path), PATH, "no size and sha256", "unset HF_ENDPOINT", "by hand")
    assert names(tmp_path) == []


def test_without_a_network(tmp_path: Path, hub: Hub) -> None:
    remedies = ("check the network", f"fetch https://huggingface.co{PATH} by hand", "gunzip -k")
    assert_user_error(run("http://127.0.0.1:1", tmp_path), f"http://127.0.0.1:1{PATH}: ", *remedies)
    assert_user_error(run(address(hub), tmp_path, HF_HUB_OFFLINE="1"), "offline mode", *remedies)
    assert names(tmp_path) == []


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_an_existing_archive_is_enough_without_a_network(tmp_path: Path, offline: dict[str, str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{NAME}.gz").write_bytes(Hub.body)
    result = run("http://127.0.0.1:1", tmp_path, **offline)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / NAME).read_bytes() == TEXT
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{tmp_path / 'data' / NAME}.gz exists and is used without comparing it with the hub's: ")


@pytest.mark.parametrize("body", [Hub.body[:-100], b"<html>", Hub.body[:-8] + bytes(8)])
def test_without_a_network_a_damaged_archive_is_recognized_by_its_own_checksum(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{NAME}.gz").write_bytes(body)
    assert_user_error(run("http://127.0.0.1:1", tmp_path, HF_HUB_OFFLINE="1"), f"{NAME}.gz is damaged", "remove it")
    assert names(tmp_path) == [f"{NAME}.gz"]


def test_the_archive_can_stay_packed_and_is_read_by_the_next_step(tmp_path: Path, hub: Hub) -> None:
    for ranges in ([None], [None]):  # the second time it is only checked
        result = run(address(hub), tmp_path, "--no_unpack")
        assert result.returncode == 0, result.stderr
        assert names(tmp_path) == [f"{NAME}.gz"]
        assert hub.ranges == ranges
    packed = tmp_path / "data" / f"{NAME}.gz"
    prepared = call_command("dataset/prepare_aozora_jsonl.py", "--jsonl_path", packed, "--output_dir", tmp_path / "001")
    assert prepared.returncode == 0, prepared.stderr
    assert json.loads((tmp_path / "001" / "manifest.json").read_bytes())["works"] == 200


def test_an_address_that_is_no_hub(tmp_path: Path, hub: Hub) -> None:
    assert_user_error(run(f"{address(hub)}/elsewhere", tmp_path), "404", f"fetch https://huggingface.co{PATH} by hand")
    assert names(tmp_path) == []


def limit_files_to_5_mib() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))


@pytest.mark.parametrize("body", [LARGE_BODY, gzip.compress(bytes(CHUNK), mtime=0)])
def test_full_disk_leaves_no_incomplete_text(tmp_path: Path, hub: Hub, body: bytes) -> None:
    """Full while fetching, and, with a body of zeros that packs well, while unpacking."""
    hub.body = hub.described_body = body
    arguments = command(SCRIPT, "--output_dir", tmp_path / "data")
    how: dict[str, Any] = {"env": settings(address(hub), tmp_path), "preexec_fn": limit_files_to_5_mib}
    assert_user_error(
        subprocess.run(arguments, **how, capture_output=True, text=True), "file too large; raise the limit"
    )
    assert names(tmp_path) == [f"{NAME}.gz.partial" if body == LARGE_BODY else f"{NAME}.gz"]
    assert run(address(hub), tmp_path).returncode == 0
    assert names(tmp_path) == [NAME, f"{NAME}.gz"]


def test_output_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    assert_user_error(run("http://127.0.0.1:1", tmp_path), f"--output_dir {tmp_path / 'data'} is a file; name a folder")
