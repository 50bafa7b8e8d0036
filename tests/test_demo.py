"""demo.py in a real browser (headless Chromium by Playwright), and its answers to hostile requests."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import ROOT, assert_user_error, call_command, command, environment

import demo
from gptkit.generation import cpu_linear, generate
from gptkit.generation.sampling import SamplingSettings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Without a network, what a browser sends by itself only fails.
NO_BACKGROUND_TRAFFIC = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync")  # fmt: skip


@pytest.fixture(scope="module")
def url(poem: tuple[Path, str], babble: Path) -> Iterator[str]:
    """Serve the page in a process and yield its address."""
    demo_command = command(
        "demo.py", "--exp_dir", poem[0], "--compare_exp_dir", babble, "--port", 0, "--most_new_tokens", 100_000
    )
    with subprocess.Popen(
        [demo_command[0], "-u", *demo_command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env=environment(),
    ) as process:
        assert process.stdout
        output = ""
        for line in process.stdout:
            output += line
            if found := re.search(r"http://\S+", line):
                assert found[0].startswith("http://127.0.0.1:")  # only this machine
                yield found[0]
                break
        else:
            pytest.fail(output)
        process.terminate()


@pytest.fixture
def page(url: str) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(NO_BACKGROUND_TRAFFIC))
        page = browser.new_page(viewport={"width": 1280, "height": 900}, locale="ja-JP")
        page.goto(url)
        page.get_by_role("button", name="書く", exact=True).wait_for(timeout=60_000)
        yield page
        browser.close()


def set_slider(page: Any, label: str, value: float) -> None:
    box = page.get_by_label(re.compile(f"number input for {label}")).first
    box.fill(str(value))
    box.press("Enter")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_writing_in_a_browser(page: Any, poem: tuple[Path, str]) -> None:
    """Type, write, continue from a place in the text, stop, turn the text vertical, compare."""
    recited, text = poem[1], page.locator("#text textarea")
    set_slider(page, "温度", 0)
    set_slider(page, "繰り返しを抑える", 1)
    page.get_by_label("書き出し").first.fill("雨、春")
    page.get_by_role("button", name="書く", exact=True).click()
    page.wait_for_function(
        "([text, end]) => text.value.endsWith(end)", arg=[text.element_handle(), recited[-3:]], timeout=60_000
    )
    assert text.input_value() == f"雨、春{recited}"

    text.evaluate("element => { element.focus(); element.setSelectionRange(0, 4); }")  # 雨、春 and one character
    text.dispatch_event("select")
    page.wait_for_timeout(500)
    page.get_by_role("button", name=re.compile("続きを書く")).click()
    page.wait_for_timeout(1500)
    assert text.input_value() == f"雨、春{recited}"

    text.fill("雪の日")  # by a model that comes to no end
    page.get_by_label(re.compile("モデル")).first.click()
    page.get_by_role("option", name=re.compile("babble")).click()
    set_slider(page, "長さ", 100_000)
    page.get_by_role("button", name=re.compile("続きを書く")).click()
    page.wait_for_function("text => text.value.length > 10", arg=text.element_handle(), timeout=60_000)

    page.get_by_label("縦書き").check()
    assert text.evaluate("element => getComputedStyle(element).writingMode") == "vertical-rl"
    if os.environ.get("SCREENSHOT"):
        page.screenshot(path=os.environ["SCREENSHOT"])
    page.get_by_role("button", name="止める").first.click()
    page.wait_for_timeout(1500)
    stopped = text.input_value()
    assert len(stopped) > 10
    page.wait_for_timeout(1500)
    assert text.input_value() == stopped
    page.get_by_label("縦書き").uncheck()
    assert text.evaluate("element => getComputedStyle(element).writingMode") == "horizontal-tb"

    page.get_by_role("tab", name="くらべる").click()
    page.get_by_role("button", name="両方で書く").click()
    for number in (0, 1):
        element = page.locator(f"#text_{number} textarea").element_handle()
        page.wait_for_function("text => text.value.length > 10", arg=element, timeout=60_000)


@pytest.mark.slow
def test_hostile_requests(poem: tuple[Path, str], tmp_path: Path) -> None:
    """Run benchmarks/checks/demo_requests.py with few requests."""
    benchmark = command("benchmarks/checks/demo_requests.py", "--exp_dir", poem[0], "--n_requests", 40)
    variables = environment() | {"RESULTS_DIR": str(tmp_path)}
    result = subprocess.run(benchmark, cwd=ROOT, env=variables, capture_output=True, encoding="utf-8", timeout=300)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "demo_requests.json").read_text("utf-8"))
    assert found["requests"] >= 40
    assert all(found["goals"].values()), found
    assert any(name.startswith("refused") for name in found["outcomes"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the server's thread exits
def test_user_errors(tmp_path: Path, poem: tuple[Path, str]) -> None:
    assert_user_error(call_command("demo.py", "--exp_dir", tmp_path / "none"), "--exp_dir")
    assert_user_error(
        call_command("demo.py", "--exp_dir", poem[0], "--host", "256.1.1.1", "--port", 7999), "--host 256.1.1.1"
    )


def test_without_gradio_one_line_names_what_to_install(poem: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # so that importing it raises ImportError
    assert_user_error(call_command("demo.py", "--exp_dir", poem[0]), "pip install gradio")


def test_a_draft_does_not_change_the_text(babble: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = demo.find_folders([str(babble)]).values()
    texts = []
    for min_entries in (cpu_linear.MIN_DRAFT_ENTRIES, 0):  # the second as if the model were large
        monkeypatch.setattr(cpu_linear, "MIN_DRAFT_ENTRIES", min_entries)
        loaded = demo.load_model(folder, torch.device("cpu"))
        with mock.patch.object(generate, "speculate", wraps=generate.speculate) as speculating:
            texts.append(list(demo.growing_text(loaded, "雨が", SamplingSettings(), 40, 5))[-1])
        assert speculating.call_count == (min_entries == 0)
    assert texts[0] == texts[1]
