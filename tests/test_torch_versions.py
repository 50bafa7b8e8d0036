"""benchmarks/torch_versions.sh with a Python that installs nothing: what becomes of each part, and the table of results."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

# As PYTHON it makes environments in which it is the Python too; there, torch has the version that the file has.
PYTHON = """#!/bin/sh
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"import importlib.metadata"*) cat "{folder}/torch" ;;
  -) if [ "${{0##*/}}" = python ]; then exit 1; fi; exec "{python}" "$@" ;;
  "- "*) exec "{python}" "$@" ;;
  {cases}
  *pytest*) echo "3 passed, 1 skipped in 0.10s" ;;
  *) echo "$@" ;;
esac
"""


def run_script(
    folder: Path, cases: str, *versions: str
) -> tuple[subprocess.CompletedProcess, dict[str, dict[str, str]]]:
    (folder / "torch").write_text("2.6.0")
    python = folder / "fake_python"
    python.write_text(PYTHON.format(folder=folder, python=sys.executable, cases=cases))
    python.chmod(0o755)
    folders = {"WORK_DIR": str(folder / "work"), "RESULTS_DIR": str(folder / "results")}
    result = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "torch_versions.sh"), *versions],
        env=environment() | folders | {"PYTHON": str(python)},
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert not (folder / "work" / "environment").exists()
    return result, json.loads((folder / "results" / "torch_versions.json").read_bytes())["rows"]


def test_each_version_has_a_row(tmp_path: Path) -> None:
    result, rows = run_script(tmp_path, "", "2.6.0", "lowest")
    assert result.returncode == 0, result.stderr
    counted = "3 passed, 1 skipped"
    for version in ("2.6.0", "lowest"):
        parts = {name: rows[version][name] for name in ("install", "road", "tests", "parallel")}
        assert parts == {"install": "passed", "road": "passed", "tests": counted, "parallel": counted}
    assert "-m pip install --quiet torch==2.6.0\n" in (tmp_path / "work" / "2.6.0.install.txt").read_text("utf-8")
    lowest = (tmp_path / "work" / "requirements.txt").read_text("utf-8")
    bounds = (ROOT / "requirements.txt").read_text("utf-8")
    assert lowest == bounds.replace(">=", "==")
    assert lowest.count("==") > 5

    _, more = run_script(tmp_path, "", "2.9.1")
    assert more.keys() == {"2.6.0", "lowest", "2.9.1"}


@pytest.mark.parametrize(
    ("cases", "part", "reason"),
    [
        ('*"-r "*requirements.txt) printf 2.15.0 >"{folder}/torch" ;;', "install", "replaced torch 2.6.0 by 2.15.0"),
        ("evaluate_model.py*) echo no such thing; exit 3 ;;", "road", "no such thing"),
        ("*pytest*test_parallel.py*) echo 1 failed; exit 1 ;;", "parallel", "1 failed"),
    ],
)
def test_a_part_that_fails_is_named(tmp_path: Path, cases: str, part: str, reason: str) -> None:
    result, rows = run_script(tmp_path, cases.format(folder=tmp_path), "2.6.0")
    assert result.returncode == 1
    assert "== failed on: 2.6.0" in result.stderr
    assert rows["2.6.0"][part].startswith("FAILED: ")
    assert reason in rows["2.6.0"][part]
    assert [text for text in rows["2.6.0"].values() if str(text).startswith("FAILED")] == [rows["2.6.0"][part]]
