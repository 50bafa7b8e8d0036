"""Draw what aozora.py measured: validation loss over the epochs of each contender, as an SVG.

The variant and the seed of a contender are chosen as aozora.py chooses the variant that counts. For example

    python benchmarks/curves.py --track 1M --output_path curves.svg
"""

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aozora import CONTENDERS
from machine import log, result_path
from side_by_side import variant_of

from gptkit.base.cli import UserError, run_command, setting
from gptkit.base.files import write_atomically
from gptkit.report.charts import HEIGHT, LEFT, WIDTH, Curve, draw_plot

COLOURS = ("#0067a5", "#c44e00", "#00805c", "#a8437f")  # readable on white and on a dark page alike
STYLE = """
text { font: 13px sans-serif; fill: #777 } .grid { stroke: #7774 } .axis { stroke: #777 }
.curve { fill: none; stroke: var(--c); stroke-width: 2.4; stroke-linejoin: round } .curve.dot { fill: var(--c) }
"""
LEGEND_LINE = 18  # the height of a line, in SVG units


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Draw the validation losses that aozora.py measured."""

    track: str = setting(help="the track, whose result file is in benchmarks/results")
    output_path: str = setting(help="the picture, an .svg file")


def main(config: CurvesConfig) -> None:
    path = result_path(f"aozora_{config.track}")
    if not path.exists():
        raise UserError(f"--track {config.track}: there is no {path}; run benchmarks/aozora.py first")
    picture = draw(json.loads(path.read_bytes()))
    write_atomically(Path(config.output_path), picture.encode())
    log(f"written: {config.output_path}")


def draw(result: Mapping[str, Any]) -> str:
    """Return an SVG with the curve of each contender's variant that counts, by its first seed."""
    curves = []
    for n, name in enumerate(CONTENDERS):  # the same colour in each picture
        if name not in result["contenders"]:
            continue
        variant, (run, *_) = variant_of(result["contenders"][name])
        points = [(float(epochs), float(val_loss)) for epochs, _, val_loss in run["curve"]]
        size = "" if run["size"] in variant else f"{run['size']}, "
        curves.append(Curve(f"{name} ({size}{variant})", n, points))
    drawn, _ = draw_plot("epochs", curves)
    title = f"Validation loss (nats per token), track {result['track']}, {result['minutes']:g} minutes each"
    height = HEIGHT + LEGEND_LINE * (len(curves) + 1) + 6
    styles = STYLE + "".join(f".c{n} {{ --c: {colour} }}" for n, colour in enumerate(COLOURS))
    legend = f'<text x="{LEFT}" y="{HEIGHT + 12.5}">{title}</text>'
    for line, curve in enumerate(curves, 1):
        y = HEIGHT + LEGEND_LINE * line + 8
        legend += f'<line class="curve c{curve.colour}" x1="{LEFT}" x2="{LEFT + 24}" y1="{y}" y2="{y}"/>'
        legend += f'<text x="{LEFT + 32}" y="{y + 4.5}">{html.escape(curve.name)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}">'
        f"<title>{title}</title><style>{styles}</style>{drawn}{legend}</svg>\n"
    )


if __name__ == "__main__":
    run_command(CurvesConfig, main)
