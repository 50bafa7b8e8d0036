"""benchmarks/gpu_suite.sh with all sizes tiny: it runs to its end, its checks hold, and it does nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SAMPLE_TOKENIZER, environment, write_jsonl

RESULTS = ("gpu_check.json", "train_speed_500.json", "quality_metrics.jsonl", "evaluation.json", "parallel_check.json")
PARTS = ("check", "speed", "quality", "evaluation", "parallel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VARIABLES = (
    "DATA_DIR",
    "TOKENIZER_PATH",
    "TEXT_PATH",
    "NANOGPT_DIR",
    "WORK_DIR",
    "JSONL_PATH",
    "HELDOUT",
    "BEFORE_DIR",
)
NO_VARIABLES = dict.fromkeys((*VARIABLES, "PARTS", "AOZORA_MINUTES"), "")


def run_suite(output: Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh")],
        cwd=cwd,
        env=environment() | NO_VARIABLES | {"TINY": "1", "PYTHON": sys.executable, "OUT": str(output)} | variables,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def python_without_torch(path: Path, commands: str) -> Path:
    """A Python that names the device at once, and treats the commands of the suite as a case of sh does."""
    path.write_text(f"#!/bin/sh\ncase $1 in -c) echo {DEVICE} ;; {commands} esac\n")
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_it_runs_to_its_end_its_checks_hold_and_it_does_nothing_twice(tmp_path: Path) -> None:
    output, published = tmp_path / "out", ROOT / "benchmarks" / "results"
    write_jsonl(tmp_path / "text.jsonl", ["　雨の朝、駅までの道は静かだった。\n傘の列がゆっくりと橋を渡る。"])
    before = listing(published)
    result = run_suite(output, tmp_path, TEXT_PATH="text.jsonl")  # relative to where it is started
    assert result.returncode == 0, result.stdout + result.stderr
    assert listing(published) == before
    assert_results(output)
    assert_checks(output)

    before = listing(output)
    idle = str(python_without_torch(tmp_path / "python", "*) exit 3 ;;"))
    again = run_suite(output, tmp_path, TEXT_PATH="text.jsonl", PYTHON=idle)
    assert again.returncode == 0, again.stderr
    skipped = [line for line in again.stdout.splitlines() if line.endswith("done before, skipped")]
    assert skipped == [f"== {part}: done before, skipped" for part in PARTS]
    assert listing(output) == before

    path = output / "gpu_check.json"
    path.write_text(path.read_text("utf-8").replace(": true", ": false", 1), "utf-8")
    failed = run_suite(output, tmp_path, PYTHON=idle)
    assert failed.returncode == 1
    assert "bfloat16" in failed.stderr
    assert "checks failed" in failed.stderr


def assert_results(output: Path) -> None:
    for name in (*RESULTS, *(f"{part}.{end}" for part in PARTS for end in ("done", "txt"))):
        assert (output / name).is_file(), name
    speed = json.loads((output / "train_speed_500.json").read_bytes())
    assert speed["missing"]["nanogpt"] == "no --nanogpt_dir"
    assert {"ours", "ours_modern_muon", "transformers"} <= speed["median_tokens_per_s"].keys()
    last = (output / "quality_metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["step"] == 5
    evaluation = json.loads((output / "evaluation.json").read_bytes())
    assert 0 < evaluation["bits_per_char"] < 13
    assert evaluation["tokenizer"] == str(SAMPLE_TOKENIZER)


def assert_checks(output: Path) -> None:
    found = json.loads((output / "gpu_check.json").read_bytes())
    assert len(found["checks"]) + len(found["skipped"]) == 9
    assert all(found["checks"].values()), found
    assert not found["problems"]
    assert set(found["skipped"].values()) <= {"galore-torch is not installed"}
    # There was something to check: losses below that of a uniform guess, and a run that had stopped.
    named = {key: value for figures in found["figures"].values() for key, value in figures.items()}
    assert max(named["gpt2_loss_float32"], named["modern_loss_float32"]) < 4.5
    assert named["stops"] == 1


def test_a_part_that_fails_is_not_done_and_the_others_still_run(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    kind = f"{DEVICE}_tiny"
    for part in ("check", "quality", "parallel"):
        (output / f"{part}.done").write_text(kind + "\n")
    (output / "check.done").write_text("another_device\n")
    work = output / "work" / f"quality_{kind}"
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text("{}\n")
    python = python_without_torch(tmp_path / "python", f'*gpu_check.py) exit 3 ;; *) exec "{sys.executable}" "$@" ;;')
    result = run_suite(output, tmp_path, NANOGPT_DIR="none", PYTHON=str(python))
    assert result.returncode == 1
    assert "== check: failed, or out of time" in result.stdout  # done on another kind of device is not done
    assert "== quality: done before, skipped" in result.stdout
    assert "error: --nanogpt_dir" in result.stdout
    assert "not finished: check speed;" in result.stderr
    assert not (output / "speed.done").exists()


def test_without_torch_it_prints_an_error(tmp_path: Path) -> None:
    no_torch = tmp_path / "python"
    no_torch.write_text("#!/bin/sh\nexit 1\n")
    no_torch.chmod(0o755)
    result = run_suite(tmp_path / "out", tmp_path, PYTHON=str(no_torch))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_part_aozora_runs_alone(tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = run_suite(output, tmp_path, PARTS="aozora")
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((output / "aozora_sample.json").read_bytes())
    assert found["contenders"]["ours"]["auto, seed 123"]["steps"] == 20
    assert [path.name for path in output.glob("*.done")] == ["aozora_ours.done"]


def test_the_part_aozora_is_skipped_without_its_corpus(tmp_path: Path) -> None:
    result = run_suite(tmp_path / "out", tmp_path, PARTS="aozora", TINY="")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "== aozora: skipped; it needs a GPU, and the paths JSONL_PATH and HELDOUT\n"
