"""Send hostile requests to demo.py: lengths, sizes, types, control characters, paths, many at once; and two visitors' texts.

The page is a real process. After each burst it must answer an ordinary request; what one visitor gets must never hold a
word of another's; and the process may not grow. Requests go to this machine only and are bounded in number.

    python benchmarks/checks/demo_requests.py --exp_dir quickstart_run
"""

import concurrent.futures
import json
import random
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _path  # noqa: F401  it lets the modules of benchmarks/ be imported
from machine import log, script, versions, write_result

from gptkit.base.cli import run_command, setting
from gptkit.base.paths import existing_path

N_AT_ONCE = 8
TIMEOUT_S = 120
MOST_GROWTH_MIB = 300
TEXTS: list[Any] = [
    "", " ", "\0", "\x1b[2J\x07\b", "\ud800", "\ufeff", "<script>alert(1)</script>", "${alert(1)}", "{{7*7}}", "' OR 1=1 --",
    "../../../etc/passwd", "file:///etc/passwd", "雨" * 19_999, "雨" * 20_001, "a" * 900_000, "\u202e\u200f\u2066", "\n" * 5000, "🐈\u200d⬛" * 3000,
    None, 7, [], {}, True, [["雨"]], {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}},
]  # fmt: skip
NUMBERS: list[Any] = [-1, 0, 1, 2.5, 1e9, 1e308, -1e308, 2**63, 2**70, None, "0.5", "x", [], {}, True]
PATHS = [
    "/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/file=/etc/passwd", "/gradio_api/file=demo.py",
    "/gradio_api/file=http://127.0.0.1:1/", "/gradio_api/proxy=http://127.0.0.1:1/", "/static/../demo.py",
    "/assets/..%2f..%2fdemo.py", "/gradio_api/upload", "/gradio_api/nothing", "/config", "/gradio_api/info", "/theme.css",
]  # fmt: skip
WORDS = ("XQalphaXQ", "XQbetaXQ", "XQgammaXQ", "XQdeltaXQ")


@dataclass(frozen=True, kw_only=True)
class DemoRequestsConfig:
    """Send hostile requests to demo.py."""

    exp_dir: str = setting(help="an experiment with a trained model")
    n_requests: int = setting(200, "hostile requests, at least", at_least=1)


def main(config: DemoRequestsConfig) -> None:
    page = Page(existing_path(config.exp_dir, "--exp_dir"))
    draw = random.Random(0)
    outcomes: Counter[str] = Counter()
    own_text: list[bool] = []
    try:
        with concurrent.futures.ThreadPoolExecutor(N_AT_ONCE) as pool:
            own_text += pool.map(lambda word: send_ordinary(page, word), WORDS)  # also warms the page up
            before_mib = page.resident_mib()
            while outcomes.total() < config.n_requests:
                requests = [pool.submit(send_hostile, page, random.Random(draw.random())) for _ in range(N_AT_ONCE)]
                visitors = [pool.submit(send_ordinary, page, word) for word in WORDS[:2]]
                outcomes.update(request.result() for request in requests)
                own_text += [visitor.result() for visitor in visitors]
                log(f"{outcomes.total()} requests, {page.resident_mib():.0f} MiB: {dict(outcomes)}")
        after_mib = page.resident_mib()
        is_alive = page.process.poll() is None
    finally:
        page.process.terminate()
        page.process.wait(30)
    time.sleep(0.1)
    result = {
        "requests": outcomes.total(),
        "outcomes": dict(outcomes),
        "ordinary_requests_between": len(own_text),
        "answered_with_their_own_text": sum(own_text),
        "resident_mib_before_and_after": [round(before_mib), round(after_mib)],
        "versions": versions("gradio", "torch"),
        "goals": {
            "the page lives": is_alive,
            "each visitor got their own text alone": all(own_text),
            f"it grew by less than {MOST_GROWTH_MIB} MiB": after_mib - before_mib < MOST_GROWTH_MIB,
        },
    }
    write_result("demo_requests", result)


class Page:
    """The process of the page, and requests to it."""

    def __init__(self, exp_dir: Path) -> None:
        command = script("demo.py", exp_dir=exp_dir, port=0, device="cpu", most_new_tokens=30)
        self.process = subprocess.Popen(
            [command[0], "-u", *command[1:]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        assert self.process.stdout
        output = ""
        for line_of_output in self.process.stdout:
            output += line_of_output
            if found := re.search(r"http://127\.0\.0\.1:\d+", line_of_output):
                self.url = found[0]
                break
        else:
            sys.exit(f"error: demo.py did not start\n{output}")
        self.log: list[str] = []
        self.pool = concurrent.futures.ThreadPoolExecutor(1)
        self.pool.submit(lambda: self.log.extend(self.process.stdout or ()))
        config = json.loads(self.get("/config")[1])
        self.start, self.more, self.both = (
            next(d for d in config["dependencies"] if d["api_name"] == name)
            for name in ("write", "continue_text", "write_both")
        )
        values = {component["id"]: component["props"].get("value") for component in config["components"]}
        self.defaults = [values.get(i) for i in self.start["inputs"]]

    def get(self, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Request a path, and return the status (0: no answer) and the beginning of the content."""
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return answer.status, answer.read(10_000_000)
        except urllib.error.HTTPError as error:
            return error.code, error.read(10_000_000)
        except (urllib.error.URLError, ConnectionError) as error:
            return 0, str(error).encode()

    def ask(self, function: Any, data: list[Any]) -> tuple[str, list[Any]]:
        """Call a function of the page as a new visitor; return the outcome, such as "written", and all that was shown."""
        session = uuid.uuid4().hex
        body = json.dumps({"data": data, "fn_index": function["id"], "session_hash": session}).encode()
        status, _ = self.get("/gradio_api/queue/join", body)
        if status != 200:
            return f"refused with {status}", []
        shown, outcome = [], "no answer"
        with urllib.request.urlopen(
            f"{self.url}/gradio_api/queue/data?session_hash={session}", timeout=TIMEOUT_S
        ) as lines:
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                message = json.loads(line[5:])
                shown.append(message.get("output"))
                if message["msg"] == "process_completed":
                    outcome = "written" if message["success"] else "refused in words"
                if message["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                    break
        return outcome, shown

    def resident_mib(self) -> float:
        """Return the memory of the page's process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found
        return int(found[1]) / 1024


def send_hostile(page: Page, draw: random.Random) -> str:
    """Send one hostile request, and return its outcome."""
    how = draw.randrange(6)
    if how == 0:
        status, content = page.get(draw.choice(PATHS), draw.choice([None, b"{}", b"x" * 1000]))
        assert b"root:x:" not in content, "a file of this machine was served"
        assert b"import_gradio" not in content, "a source was served"
        return f"status {status}"
    if how == 1:
        body = draw.choice(
            [b"", b"{", b"[" * 100_000, b"\xff" * 100, b'{"data": ' + b"9" * 6000 + b"}", b"x" * 5_000_000]
        )
        return f"status {page.get('/gradio_api/queue/join', body)[0]}"
    data = list(page.defaults)
    data[0] = draw.choice(TEXTS)
    for _ in range(draw.randrange(3)):
        data[draw.randrange(1, len(data))] = draw.choice(NUMBERS + TEXTS[:10])
    function = page.start
    if how == 2:
        function = page.more
        data[1:1] = [None]
    if how == 3:
        function = page.both
        data = [data[0], *data[1:], *data[1:]]
    if how == 4:
        data = (
            data[: draw.randrange(len(data))]
            if draw.random() < 0.5
            else data + [draw.choice(TEXTS)] * draw.randrange(1, 50)
        )
    return page.ask(function, data)[0]


def send_ordinary(page: Page, word: str) -> bool:
    """Return whether a visitor gets a text that begins with their own word, and nothing of another's."""
    data = list(page.defaults)
    data[0] = f"{word}は"
    outcome, shown = page.ask(page.start, data)
    text = json.dumps(shown, ensure_ascii=False)
    others = [other for other in WORDS if other != word]
    return outcome == "written" and f"{word}は" in text and not any(other in text for other in others)


if __name__ == "__main__":
    run_command(DemoRequestsConfig, main)
