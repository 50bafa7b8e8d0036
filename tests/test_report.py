"""report.py and the files it reads: real runs, hostile and old files, and the page in a real browser."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_user_error, call_command, small_run
from test_demo import CHROMIUM, NO_BACKGROUND_TRAFFIC

from gptkit.report.charts import Curve, format_number, line_chart, thin, ticks
from gptkit.report.page import format_count, render_page
from gptkit.report.records import RunRecord, pick_evenly
from gptkit.training.run_log import as_number

HOSTILE = "</p></article><script>document.title='broken'</script><img src=x onerror=alert(1)>&amp;\u2028\u202e\0"
VOID = {"meta", "br", "line", "polyline", "circle", "img", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, which must be closed in the order in which they were opened, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data

    def charts(self) -> dict[str, Any]:
        """Return the numbers of each chart by its title."""
        labels = [attributes["aria-label"] for tag, attributes in self.elements if tag == "svg"]
        data = [attributes["data-chart"] for _, attributes in self.elements if "data-chart" in attributes]
        return dict(zip(labels, map(json.loads, data), strict=True))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory, sample_shards: Path, sample_tokens: Path) -> Path:
    """Make exp001, a run that stopped and was resumed, and exp002, a copy of the stopped run resumed at another rate."""
    root = tmp_path_factory.mktemp("experiments")

    def train(name: str, *more: object) -> None:
        arguments = small_run(sample_shards, root / name / "model_checkpoints", "adamw")
        reports = ("--max_steps", 8, "--eval_freq", 2, "--print_sample_iter", 4, "--start_context", "<b>春")
        result = call_command("pretraining.py", *arguments, *reports, *more)
        assert result.returncode == 0, result.stderr

    train("exp001", "--max_minutes", 0.00001)
    shutil.copytree(root / "exp001", root / "exp002")
    train("exp001")
    train("exp002", "--lr", 0.001)
    return root


def test_a_run_writes_samples_and_sessions(experiments: Path) -> None:
    folder = experiments / "exp001" / "model_checkpoints"
    samples = lines(folder / "samples.jsonl")
    tokens_per_step = 4 * 2 * 32
    assert [(sample["step"], sample["tokens"]) for sample in samples] == [
        (step, step * tokens_per_step) for step in (4, 8)
    ]
    assert all(sample["text"].startswith("<b>春") for sample in samples)
    first, second = lines(folder / "sessions.jsonl")
    assert (first["step"], first["end"]["step"], first["end"]["how"]) == (0, 1, "stopped")
    assert (second["step"], second["end"]["step"], second["end"]["how"]) == (1, 8, "finished")
    assert first["settings"]["max_steps"] == 8
    assert "max_minutes" in first["settings"].keys() - second["settings"].keys()
    assert "weight_decay" not in first["settings"]  # it has its default
    assert second["environment"]["device"].startswith("cpu")
    assert datetime.fromisoformat(first["time"]) <= datetime.fromisoformat(second["end"]["time"])


def test_the_page_shows_metrics_and_samples_of_a_run(experiments: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    result = call_command("report.py", "--exp_dir", experiments / "exp001", "--output", output)
    assert result.returncode == 0, result.stderr
    source = output.read_text("utf-8")
    page = Page(source)
    assert ("html", {"lang": "ja"}) in page.elements
    assert not re.search(r"""(src=|href=|url\(|@import|https?:)""", source)  # it needs no other file
    metrics = lines(experiments / "exp001" / "model_checkpoints" / "metrics.jsonl")
    charts = page.charts()
    train, val = charts["損失（トークンあたり）"]["curves"]
    assert [point[1] for point in val["points"]] == [report["val_loss"] for report in metrics]
    assert [point[1] for point in train["points"]] == [report["train_loss"] for report in metrics]
    assert [point[1] for point in charts["学習率"]["curves"][0]["points"]] == [report["lr"] for report in metrics]
    assert source.count('class="mark c0"') == 0  # the restart was after step 1, before the first report
    assert "完了" in page.text
    assert "<b>春" in page.text  # as text
    for sample in lines(experiments / "exp001" / "model_checkpoints" / "samples.jsonl"):
        assert sample["text"].removeprefix("<b>春") in page.text
    assert "設定の違い" not in page.text
    same = call_command("report.py", "--exp_dir", experiments / "exp001" / "model_checkpoints", "--output", output)
    assert same.returncode == 0, same.stderr
    assert list(tmp_path.iterdir()) == [output]


def test_a_comparison_begins_with_the_differences(experiments: Path, tmp_path: Path) -> None:
    """A copied experiment that was resumed at another rate: the copy's sessions show both rates."""
    output = tmp_path / "report.html"
    compared = [experiments / name for name in ("exp001", "exp002")]
    result = call_command("report.py", "--exp_dir", compared[0], "--compare", *compared, "--output", output)
    assert result.returncode == 0, result.stderr
    source = output.read_text("utf-8")
    page = Page(source)
    differences = source[source.index("設定の違い") : source.index("<h2>曲線")]
    rows = re.findall(r"<th scope=row><code>(\w+)</code></th><td>(.*?)</td><td>(.*?)</td>", differences)
    assert rows == [("lr", "0.003", "0.001")]
    names = [curve["name"] for curve in page.charts()["損失（時間）"]["curves"]]
    assert names == ["exp001 学習", "exp001 検証", "exp002 学習", "exp002 検証"]
    assert "<code>lr</code> 0.003 → 0.001" in source
    assert source.index("設定の違い") < source.index("<h2>設定<")


def test_mistakes_are_errors_of_one_line(experiments: Path, tmp_path: Path) -> None:
    exp001 = experiments / "exp001"
    assert_user_error(call_command("report.py", "--exp_dir", tmp_path / "none"), "--exp_dir")
    assert_user_error(call_command("report.py", "--exp_dir", tmp_path), "holds no run")
    within = [exp001 / "model_checkpoints" / name for name in ("latest", "metrics.jsonl")]
    results = [call_command("report.py", "--exp_dir", path, "--output", tmp_path / "a.html") for path in within]
    assert [result.returncode for result in results] == [0, 0], results
    assert_user_error(
        call_command("report.py", "--exp_dir", exp001, "--compare", tmp_path), "--compare", "holds no run"
    )
    assert_user_error(call_command("report.py", "--exp_dir", exp001, "--output", tmp_path / "README.md"), "--output")
    assert_user_error(
        call_command("report.py", "--exp_dir", exp001, "--output", tmp_path / "no" / "a.html"), "--output"
    )
    for name in ("a", "b"):
        shutil.copytree(exp001 / "model_checkpoints", tmp_path / name)
    assert_user_error(call_command("report.py", "--exp_dir", tmp_path), "several runs")


def hostile_run(name: str = HOSTILE) -> RunRecord:
    """Return a run in which every text is an attack, and which has every kind of broken number."""
    numbers: list[Any] = [1.5, "1", None, True, [], {}, float("nan"), float("inf"), 10**400, -1e300, 2.5]
    metrics = [{"step": n, "tokens": n * 10, "elapsed_s": n, "val_loss": value} for n, value in enumerate(numbers)]
    session = {"step": 3, "time": HOSTILE, "settings": {HOSTILE: HOSTILE}, "environment": {HOSTILE: [HOSTILE]}}
    return RunRecord(
        name,
        {"settings": {"start_context": "</p>", HOSTILE: HOSTILE}, "model": {"x": HOSTILE}, "tokens": HOSTILE},
        metrics,
        [{"step": n, "tokens": HOSTILE, "text": HOSTILE} for n in range(40)],
        [session, session | {"settings": 7, "end": {"how": HOSTILE, "step": HOSTILE, "reason": HOSTILE}}],
    )


@pytest.mark.parametrize("n_runs", [1, 2])
def test_texts_of_a_run_never_become_html(n_runs: int) -> None:
    source = render_page([hostile_run(), hostile_run("</title>")][:n_runs], datetime(2026, 1, 2))
    page = Page(source)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not {"img", "a", "iframe", "object", "link", "base"} & {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("document.title='broken'") >= 40
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    values = [p[1] for curve in page.charts()["損失（トークンあたり）"]["curves"] for p in curve["points"]]
    assert values == [1.5, 2.5] * n_runs


def test_old_broken_and_new_runs_have_a_page(experiments: Path, tmp_path: Path) -> None:
    output, old = tmp_path / "report.html", tmp_path / "old"
    shutil.copytree(experiments / "exp001" / "model_checkpoints", old)
    (old / "samples.jsonl").unlink()
    (old / "sessions.jsonl").unlink()
    broken, new = tmp_path / "broken", tmp_path / "new"
    broken.mkdir()
    (broken / "config.json").write_bytes(b"[" * 100_000)
    (broken / "metrics.jsonl").write_bytes(
        b'\xff{"step": 1\n[1]\n{"step": "x"}\n{"step": 2, "val_loss": 3, "tokens": 4}\n'
    )
    (broken / "samples.jsonl").write_text('{"step": 2, "text": "\\ud842"}\n')  # half a surrogate pair
    new.mkdir()
    (new / "config.json").write_text('{"format": "gptkit-run", "settings": null}')
    for folder in (old, broken, new):
        result = call_command("report.py", "--exp_dir", folder, "--output", output)
        assert result.returncode == 0, result.stderr
        Page(output.read_text("utf-8"))
    assert "まだ記録がありません" in output.read_text("utf-8")


def test_the_page_shows_how_a_run_ended() -> None:
    def state(*sessions: dict, is_running: bool = False) -> str:
        page = render_page([RunRecord("run", sessions=sessions, is_running=is_running)], datetime(2026, 1, 2))
        return html.unescape(re.findall(r"<dt>状態</dt><dd>(.*?)</dd>", page)[0])

    def ended(how: str, reason: str | None) -> dict:
        return {"step": 0, "end": {"how": how, "reason": reason}}

    assert state() == "—"
    assert state({"step": 0}, is_running=True) == "実行中"
    assert state({"step": 0}) == "途中で切れた（強制終了など）"
    assert state(ended("finished", None)) == "完了"
    assert state({"step": 0}, ended("stopped", "SIGTERM")) == "停止（SIGTERM）"
    assert state(ended("failed", "UserError: <")) == "失敗（UserError: <）"


def test_restarts_are_marked_at_the_last_report_before_them() -> None:
    reports = [{"step": step, "tokens": step * 100, "elapsed_s": step / 2} for step in (10, 20, 30)]
    run = RunRecord("run", metrics=reports, sessions=[{"step": 0}, {"step": 5}, {"step": 20}, {"step": 29}])
    assert run.restarts("tokens") == [2000, 2000]
    assert run.restarts("elapsed_s") == [10, 10]
    assert render_page([run], datetime(2026, 1, 2)).count('class="mark') == 0  # no curve, no marks
    run = RunRecord("run", metrics=[{**r, "val_loss": 1.0} for r in reports], sessions=run.sessions)
    assert render_page([run], datetime(2026, 1, 2)).count('class="mark') == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (3.1, 7.9, [3, 4, 5, 6, 7, 8]),
        (0, 0.0012, [0, 0.00025, 0.0005, 0.00075, 0.001, 0.00125]),
        (5, 5, [5, 6]),
        (0, 0, [0, 0.2]),
        (-3, 1, [-3, -2, -1, 0, 1]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_curves_are_drawn_at_their_coordinates() -> None:
    chart = line_chart("a & b", "x", [Curve("one", 3, [(0.0, 0.0), (10.0, 5.0)]), Curve("dot", 4, [(5.0, 5.0)])])
    points = re.findall(r'class="curve c3" points="(.*?)"', chart)[0].split()
    (x0, y0), (x1, y1) = (tuple(map(float, point.split(","))) for point in points)
    assert (x1 - x0, y0 - y1) == (484, 240)  # the full plot
    assert f'class="curve dot c4" cx="{(x0 + x1) / 2}" cy="{y1}"' in chart
    assert "a &amp; b" in chart
    assert "まだ記録がありません" in line_chart("nothing", "x", [Curve("one", 0, [])])


def test_thinning_a_curve_keeps_its_spikes() -> None:
    points = [(float(n), 1.0) for n in range(100_000)]
    points[77_777] = (77_777.0, 99.0)
    points[12_345] = (12_345.0, -99.0)
    thinned = thin(points)
    assert len(thinned) <= 402
    assert {points[0], points[77_777], points[12_345], points[-1]} <= set(thinned)
    assert list(thinned) == sorted(thinned)


def test_numbers_are_formatted_for_people() -> None:
    assert [format_number(value) for value in (0, 0.002, 2e-5, 3.25, 12_000)] == [
        "0",
        "0.002",
        "2e-05",
        "3.25",
        "12,000",
    ]
    counts = [format_count(n) for n in (None, 0, 9999, 12_345, 123_456, 3_456_789, 345_678_901)]
    assert counts == ["—", "0", "9,999", "1.2万", "12.3万", "346万", "3.5億"]
    assert [as_number(value) for value in (1, True, "1", 10**400, float("nan"))] == [1.0, None, None, None, None]
    assert [item["step"] for item in pick_evenly([{"step": n} for n in range(11)], 3)] == [0, 5, 10]


@pytest.fixture
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(NO_BACKGROUND_TRAFFIC))
        yield browser
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """No message on the console, no page wider than the window, and the numbers under the pointer."""
    reports = [
        {"step": n, "tokens": n * 2048, "elapsed_s": n * 1.5, "train_loss": 9 / n, "val_loss": 9.5 / n, "lr": 1e-3}
        for n in range(1, 50)
    ]
    run = RunRecord("とても長い名前の実験" * 3, metrics=reports, samples=[{"step": 2, "text": "い" * 500}])
    for name, runs in (
        ("one", [run]),
        ("several", [run, RunRecord("exp002", metrics=reports[:9])]),
        ("hostile", [hostile_run()]),
    ):
        (tmp_path / f"{name}.html").write_bytes(render_page(runs, datetime(2026, 1, 2)).encode(errors="replace"))
    for name in ("one", "several", "hostile"):
        for width in (1280, 390):
            page = browser.new_page(viewport={"width": width, "height": 900}, locale="ja-JP")
            messages: list[str] = []
            page.on("console", lambda message, messages=messages: messages.append(message.text))
            page.on("pageerror", lambda error, messages=messages: messages.append(str(error)))
            page.goto((tmp_path / f"{name}.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (name, width)
            assert page.title() != "broken"
            chart = page.locator("figure svg").first
            chart.scroll_into_view_if_needed()
            box = chart.bounding_box()
            page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 100)
            tip = page.locator(".tip:not([hidden])")
            assert "検証" in tip.inner_text()
            assert tip.bounding_box()["x"] + tip.bounding_box()["width"] <= width
            assert messages == [], (name, width)
            page.close()
