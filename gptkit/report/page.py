"""The page of report.py: one or several runs as one HTML file that needs no other file, in Japanese.

What runs wrote (settings, samples, numbers) is shown as it is, also from old or broken files, and is always escaped.
"""

import base64
import hashlib
import html
import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gptkit.base.cli import format_duration
from gptkit.base.files import as_dict
from gptkit.report.charts import Curve, line_chart
from gptkit.report.records import Record, RunRecord, pick_evenly
from gptkit.training.run_log import as_number

N_SAMPLES = 6  # shown per run; the others can be unfolded
TOKENIZER_SETTINGS = ("tokenizer", "hf_name", "tokenizer_path", "tiktoken_name", "vocab_size")
IGNORED_SETTINGS = ("output_dir",)  # they differ between any two runs
UNKNOWN = "—"
escape = html.escape


def render_page(runs: Sequence[RunRecord], now: datetime) -> str:
    """Return the page of one run, or of several runs whose curves share their charts."""
    names = "、".join(run.name for run in runs)
    title = f"{names} の学習の記録" if len(runs) == 1 else f"学習の比較：{names}"
    style, script = ((Path(__file__).parent / name).read_text("utf-8") for name in ("page.css", "page.js"))
    # The browser fetches nothing and runs no script but ours, whatever a sample contains.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    sections = [
        _section("設定の違い", _differences(runs)) if len(runs) > 1 else "",
        _section("概要", _overview(runs)),
        _section("曲線", _curves(runs)),
        _section("書いた文章", _samples(runs)),
        _section("設定", _settings(runs)),
        _section("実行と再開", "".join(_sessions(run, n, len(runs)) for n, run in enumerate(runs))),
    ]
    return (
        f'<!doctype html>\n<html lang="ja"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><header><h1>{escape(title)}</h1>"
        f"<p>{now:%Y-%m-%d %H:%M} に作成</p></header>\n<main>{''.join(sections)}</main>\n"
        f"<script>{script}</script></body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table of cells that are HTML already; the first cell of a row is its heading."""
    lines = [
        "<tr>" + "".join(f"<th scope=row>{c}</th>" if not n else f"<td>{c}</td>" for n, c in enumerate(row)) + "</tr>"
        for row in rows
    ]
    heads = "".join(f"<th scope=col>{cell}</th>" for cell in head)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _colored_name(n: int, name: str) -> str:
    return f'<span class="run c{n}"><i></i>{escape(name)}</span>'


def _headings(runs: Sequence[RunRecord]) -> list[str]:
    return [_colored_name(n, run.name) for n, run in enumerate(runs)]


def _overview(runs: Sequence[RunRecord]) -> str:
    figures = [_key_figures(run) for run in runs]
    if len(runs) == 1:
        cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures[0].items())
        return f'<dl class="cards">{cards}</dl>'
    rows = [[heading, *values.values()] for heading, values in zip(_headings(runs), figures, strict=True)]
    tokenizers = {json.dumps([run.settings().get(name) for name in TOKENIZER_SETTINGS], default=str) for run in runs}
    warning = (
        '<p class="caution">トークナイザーが違うので、損失の大きさはそのまま比べられません。'
        "<code>evaluate_model.py</code> の <code>bits_per_char</code> で比べてください。</p>"
    )
    return _table(["実行", *figures[0]], rows) + (warning if len(tokenizers) > 1 else "")


def _key_figures(run: RunRecord) -> dict[str, str]:
    """Return the key figures of a run by name, as HTML."""
    last = run.metrics[-1] if run.metrics else {}
    curve = run.curve("step", "averaged_val_loss") or run.curve("step", "val_loss")  # of the weights that are used
    losses = [(loss, step) for step, loss in curve]
    best, best_step = min(losses, default=(None, None))
    seconds = as_number(last.get("elapsed_s"))
    speeds = sorted(speed for _, speed in run.curve("step", "tokens_per_s"))
    return {
        "状態": escape(_state(run)),
        "検証の損失（最小）": UNKNOWN if best is None else f"{best:.4f} <small>ステップ {best_step:,.0f}</small>",
        "学習の損失（最後）": _format_number(as_number(last.get("train_loss")), ".4f"),
        "ステップ": _format_number(as_number(last.get("step")), ",.0f"),
        "トークン": format_count(as_number(last.get("tokens"))),
        "学習の時間": UNKNOWN if seconds is None else format_duration(seconds),
        "速さ（中央値）": f"{speeds[len(speeds) // 2]:,.0f} <small>トークン/秒</small>" if speeds else UNKNOWN,
    }


def _state(run: RunRecord) -> str:
    if run.is_running:
        return "実行中"
    end = as_dict(run.sessions[-1].get("end")) if run.sessions else None
    return UNKNOWN if end is None else _ending(end)


def _ending(end: Record) -> str:
    """Return how a session ended."""
    how = {"finished": "完了", "stopped": "停止", "failed": "失敗"}.get(str(end.get("how")))
    if how is None:
        return "途中で切れた（強制終了など）"
    return f"{how}（{end['reason']}）" if end.get("reason") else how


def _differences(runs: Sequence[RunRecord]) -> str:
    """Return the settings, and the parts of the environment, that are not the same in all runs, as a table."""
    columns = [run.settings() | {"データ": run.config.get("tokens")} for run in runs]
    rows = []
    for table, format_name in ((columns, _flag), ([run.environment() for run in runs], escape)):
        for name in dict.fromkeys(name for values in table for name in values):
            cells = [_value(values, name) for values in table]
            if name not in IGNORED_SETTINGS and len(set(cells)) > 1:
                rows.append([format_name(name), *cells])
    return _table(["項目", *_headings(runs)], rows) if rows else "<p>設定に違いはありません。</p>"


def _curves(runs: Sequence[RunRecord]) -> str:
    x_max = {name: max((x for run in runs for x, _ in run.curve(name, "step")), default=0.0) for name in X_AXES}
    axes = {name: unit_of(x_max[name]) for name, unit_of in X_AXES.items()}

    def chart(title: str, x_name: str, y_names: Sequence[str], from_share: float = 0.0, from_zero: bool = False) -> str:
        label, unit = axes[x_name]
        curves = []
        for n, run in enumerate(runs):
            marks = [x / unit for x in run.restarts(x_name)]
            for y_name in y_names:
                points = [(x / unit, y) for x, y in run.curve(x_name, y_name) if x >= from_share * x_max[x_name]]
                name = f"{run.name} " * (len(runs) > 1) + Y_NAMES[y_name]
                curves.append(Curve(name, n, points, y_name == "train_loss", marks, y_name == "averaged_val_loss"))
        return line_chart(title, label, curves, from_zero)

    losses = ("train_loss", "val_loss", "averaged_val_loss")
    charts = [
        chart("損失（トークンあたり）", "tokens", losses),
        chart("損失（時間）", "elapsed_s", losses),
        chart("検証の損失の後半", "tokens", losses[1:], from_share=0.5),
        chart("学習率", "tokens", ("lr",), from_zero=True),
        chart("勾配ノルム", "tokens", ("grad_norm",), from_zero=True),
        chart("速さ（トークン/秒）", "elapsed_s", ("tokens_per_s",), from_zero=True),
    ]
    legend = "".join(_headings(runs)) if len(runs) > 1 else ""
    kinds = '<span><i class="thick"></i>検証</span><span><i class="thin"></i>学習</span>'
    if any(run.curve("tokens", "averaged_val_loss") for run in runs):
        kinds += '<span><i class="dotted"></i>検証（平均した重み）</span>'
    if any(run.restarts("tokens") for run in runs):
        kinds += '<span><i class="dashed"></i>再開</span>'
    return f'<p class="legend">{legend}{kinds}</p><div class="charts">{"".join(charts)}</div>'


def _token_unit(x_max: float) -> tuple[str, float]:
    return next(
        (f"トークン（{name}）", unit)
        for name, unit in (("億", 1e8), ("万", 1e4), ("個", 1))
        if x_max >= unit or unit == 1
    )


def _time_unit(x_max: float) -> tuple[str, float]:
    units = (("日", 86_400), ("時間", 3600), ("分", 60), ("秒", 1))
    return next((f"時間（{name}）", unit) for name, unit in units if x_max >= 2 * unit or unit == 1)


X_AXES: dict[str, Callable[[float], tuple[str, float]]] = {"tokens": _token_unit, "elapsed_s": _time_unit}
Y_NAMES = {
    "train_loss": "学習",
    "val_loss": "検証",
    "averaged_val_loss": "検証（平均した重み）",
    "lr": "学習率",
    "grad_norm": "勾配ノルム",
    "tokens_per_s": "トークン/秒",
}


def _samples(runs: Sequence[RunRecord]) -> str:
    """Return N_SAMPLES evenly chosen samples of each run, in one column per run where there are several, else in a grid."""
    chosen = [pick_evenly(run.samples, N_SAMPLES) for run in runs]
    if not any(chosen):
        return '<p class="none">記録がありません（<code>samples.jsonl</code>）。</p>'
    cells = []
    for row in range(max(map(len, chosen))):
        for n, run in enumerate(runs):
            cells.append(_sample(run, n, chosen[n][row], len(runs) > 1) if row < len(chosen[n]) else "<div></div>")
    columns = f' style="--n: {len(runs)}"' if len(runs) > 1 else ""
    content = f'<div class="samples{" columns" if columns else ""}"{columns}>{"".join(cells)}</div>'
    rest = [
        _sample(run, n, sample, len(runs) > 1)
        for n, run in enumerate(runs)
        for sample in run.samples
        if sample not in chosen[n]
    ]
    if rest:
        content += (
            f'<details><summary>ほかの {len(rest):,} 個</summary><div class="samples">{"".join(rest)}</div></details>'
        )
    return content


def _sample(run: RunRecord, n: int, sample: Record, is_one_of_several: bool) -> str:
    text, start = str(sample.get("text", "")), str(run.settings().get("start_context") or "")
    begins = bool(start) and text.startswith(start)
    body = f"<b>{escape(start)}</b>{escape(text[len(start) :])}" if begins else escape(text)
    head = _colored_name(n, run.name) if is_one_of_several else ""
    where = f"ステップ {sample['step']:,}・{format_count(as_number(sample.get('tokens')))} トークン"
    return f'<article class="c{n}"><h3>{head}<small>{where}</small></h3><p class="honbun">{body}</p></article>'


def _settings(runs: Sequence[RunRecord]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in run.settings()))
    if not names:
        return '<p class="none">記録がありません（<code>config.json</code>）。</p>'
    data = [f"<p>データ：{escape(str(run.config['tokens']))}</p>" for run in runs[:1] if run.config.get("tokens")]
    if len(runs) > 1:
        rows = [[_flag(name), *(_value(run.settings(), name) for run in runs)] for name in names]
        return f"<details><summary>すべての設定</summary>{_table(['項目', *_headings(runs)], rows)}</details>"
    given = as_dict(runs[0].sessions[-1].get("settings")) if runs[0].sessions else {}
    items = "".join(
        f"<div{' class=given' if name in given else ''}><dt>{_flag(name)}</dt><dd>{_value(runs[0].settings(), name)}</dd></div>"
        for name in names
    )
    note = "<p>太字は、既定の値と違うものです。</p>" if given else ""
    return f'{"".join(data)}{note}<dl class="settings">{items}</dl>'


def _sessions(run: RunRecord, n: int, n_runs: int) -> str:
    """Return a table with a row for each time the run was started or resumed."""
    head = f"<h3>{_colored_name(n, run.name)}</h3>" if n_runs > 1 else ""
    if not run.sessions:
        return f'{head}<p class="none">記録がありません（<code>sessions.jsonl</code>）。</p>'
    rows = []
    before: Record = {}
    for number, session in enumerate(run.sessions):
        end = as_dict(session.get("end"))
        is_last = number == len(run.sessions) - 1
        how = "実行中" if is_last and run.is_running else _ending(end)
        rows.append(
            [
                f"{number + 1}",
                escape(_time(session.get("time"))),
                f"{session['step']:,} → {_format_number(as_number(end.get('step')), ',.0f')}",
                escape(how),
                _changes(before.get("settings"), session.get("settings"), _flag, bool(number)),
                _changes(before.get("environment"), session.get("environment"), escape, bool(number)),
            ]
        )
        before = session
    return head + _table(["回", "始まり", "ステップ", "終わり", "設定", "環境"], rows)


def _changes(before: Any, now: Any, format_name: Callable[[str], str], is_restart: bool) -> str:
    """Return what changed since the session before; for the first session, everything."""
    before, now = as_dict(before), as_dict(now)
    if not is_restart:
        return "<br>".join(f"{format_name(name)} {_value(now, name)}" for name in now)
    changed = [name for name in dict.fromkeys([*before, *now]) if before.get(name) != now.get(name)]
    lines = [f"{format_name(name)} {_value(before, name)} → {_value(now, name)}" for name in changed]
    return "<br>".join(lines) or "同じ"


def format_count(n: float | None) -> str:
    """Format a count in units of 万 and 億: 9,999; 1.2万; 3.5億."""
    if n is None:
        return UNKNOWN
    for unit, name in ((1e8, "億"), (1e4, "万")):
        if n >= unit:
            return f"{n / unit:,.{0 if n >= 100 * unit else 1}f}{name}"
    return f"{n:,.0f}"


def _flag(name: str) -> str:
    return f"<code>{escape(name)}</code>"


def _value(values: Record, name: str) -> str:
    """Return the value of a setting as HTML."""
    value = values.get(name)
    if value is None:
        return UNKNOWN
    return escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _format_number(value: float | None, spec: str) -> str:
    return UNKNOWN if value is None else format(value, spec)


def _time(text: Any) -> str:
    try:
        return f"{datetime.fromisoformat(text):%Y-%m-%d %H:%M}"
    except (TypeError, ValueError):
        return UNKNOWN
