"""Write a page about one run, or about several runs compared: curves, samples, settings and their differences, restarts.

    python report.py --exp_dir exp001
    python report.py --exp_dir exp001 --compare exp002 exp003 --output comparison.html

The page is one HTML file, in Japanese, that needs no network and no other file. The run may still be training, or may
come from an older version.
"""

from gptkit.base.startup import prepare_process

if __name__ == "__main__":
    prepare_process()  # before the imports below, which take seconds

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from gptkit.base.cli import UserError, run_command, setting, utf8_text
from gptkit.base.files import write_atomically
from gptkit.base.locks import LOCK_FILE, lock_holder
from gptkit.base.paths import existing_path
from gptkit.report.charts import N_COLOURS
from gptkit.report.page import render_page
from gptkit.report.records import RunRecord
from gptkit.training.run_log import METRICS_FILE, RUN_FILE, RUN_FORMAT, read_jsonl, read_run_config, run_name


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write a page about one run, or about several runs compared, as one HTML file in Japanese."""

    exp_dir: str = setting(help="experiment folder (or the output folder in it)")
    compare: tuple[str, ...] = setting((), "other experiment folders to compare with it")
    output: str = setting("report.html", "HTML file to write")


def main(config: ReportConfig) -> None:
    output = Path(config.output)
    if output.suffix not in (".html", ".htm") or output.is_dir():
        raise UserError(f"--output {output} is not the name of an HTML file; give one that ends with .html")
    existing_path(str(output.parent), "the folder of --output")
    folders = {find_run(config.exp_dir, "--exp_dir"): config.exp_dir}
    for other in config.compare:
        folders.setdefault(find_run(other, "--compare"), other)
    if len(folders) > N_COLOURS:
        raise UserError(f"--compare: {len(folders)} runs are too many for one page; give at most {N_COLOURS}")
    names = [run_name(folder) for folder in folders]
    runs = [
        read_run(folder, name if names.count(name) == 1 else given)
        for (folder, given), name in zip(folders.items(), names, strict=True)
    ]
    write_atomically(output, utf8_text(render_page(runs, datetime.now())).encode(errors="replace"))
    print(f"{output}: {', '.join(run.name for run in runs)}")


def find_run(exp_dir: str, flag: str) -> Path:
    """Return the output folder that `exp_dir` means: itself, or the only one in it. Raises UserError."""
    folder = existing_path(exp_dir, flag)
    candidates = [folder] if is_run(folder) else sorted(path for path in folder.glob("[!.]*/") if is_run(path))
    if not candidates and is_run(folder.absolute().parent):  # a checkpoint or a file of the run
        candidates = [folder.absolute().parent]
    if len(candidates) > 1:
        raise UserError(f"{flag} {folder} holds several runs; name one: {', '.join(map(str, candidates))}")
    if not candidates:
        raise UserError(f"{flag} {folder} holds no run ({RUN_FILE} or {METRICS_FILE}); pretraining.py writes one")
    return candidates[0].resolve()


def is_run(folder: Path) -> bool:
    """Return whether the folder is the output folder of a run."""
    return (folder / METRICS_FILE).is_file() or read_run_config(folder).get("format") == RUN_FORMAT


def read_run(folder: Path, name: str) -> RunRecord:
    """Return what a run has written so far, without missing files and broken lines."""
    metrics, samples, sessions = (read_jsonl(folder / f"{kind}.jsonl") for kind in ("metrics", "samples", "sessions"))
    is_running = lock_holder(folder / LOCK_FILE) is not None
    return RunRecord(name, read_run_config(folder), metrics, samples, sessions, is_running)


if __name__ == "__main__":
    run_command(ReportConfig, main)
