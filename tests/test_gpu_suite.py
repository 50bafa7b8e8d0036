"""benchmarks/gpu_suite.sh with all sizes tiny: it comes to its end, holds what it checks, and does nothing twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE_TOKENIZER, environment, write_jsonl

RESULTS = ("gpu_check.json", "train_speed_500.json", "quality_metrics.jsonl", "evaluation.json")
PARTS = ("check", "speed", "quality", "evaluation")
NO_VARIABLES = dict.fromkeys(("DATA_DIR", "TOKENIZER_PATH", "TEXT_PATH", "NANOGPT_DIR", "WORK_DIR"), "")


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


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess]:
    """The folder of a suite that ran through, with a text named relative to where it was started."""
    folder = tmp_path_factory.mktemp("suite")
    write_jsonl(folder / "text.jsonl", ["　雨の朝、駅までの道は静かだった。\n傘の列がゆっくりと橋を渡る。"])
    before = listing(ROOT / "benchmarks")
    result = run_suite(folder / "out", folder, TEXT_PATH="text.jsonl")
    assert result.returncode == 0, result.stdout + result.stderr
    assert listing(ROOT / "benchmarks").keys() == before.keys()
    return folder, result


def test_all_parts_leave_their_results(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    output = finished[0] / "out"
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


def test_all_checks_that_ran_are_true(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    found = json.loads((finished[0] / "out" / "gpu_check.json").read_bytes())
    assert len(found["checks"]) + len(found["skipped"]) == 7
    assert all(found["checks"].values()), found
    assert not found["problems"]
    assert set(found["skipped"].values()) <= {"galore-torch is not installed"}
    # The checks saw something to check: a loss below that of a uniform guess, and two runs of which one had stopped.
    named = {key: value for figures in found["figures"].values() for key, value in figures.items()}
    assert max(named["gpt2_loss_float32"], named["modern_loss_float32"]) < 4.5
    assert named["stops"] == 1


def test_a_second_run_skips_all_and_tells_a_false_check(finished: tuple[Path, subprocess.CompletedProcess]) -> None:
    folder, output = finished[0], finished[0] / "out"
    before = listing(output)
    again = run_suite(output, folder, TEXT_PATH="text.jsonl")
    assert again.returncode == 0, again.stderr
    assert [line for line in again.stdout.splitlines() if line.endswith("done before, skipped")] == [
        f"== {part}: done before, skipped" for part in PARTS
    ]
    after = listing(output)
    ignored = output / "work" / ".gitignore"
    assert {path: time for path, time in after.items() if path != ignored} == {
        path: time for path, time in before.items() if path != ignored
    }
    path = output / "gpu_check.json"
    path.write_text(path.read_text("utf-8").replace(": true", ": false", 1), "utf-8")
    failed = run_suite(output, folder)
    assert failed.returncode == 1
    assert "bfloat16" in failed.stderr
    assert "checks failed" in failed.stderr


def test_a_part_that_fails_is_not_done_and_the_others_go_on(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    kind = "cuda_tiny" if has_cuda() else "cpu_tiny"
    for part in ("check", "quality"):
        (output / f"{part}.done").write_text(kind + "\n")
    (output / "check.done").write_text("another_device\n")
    work = output / "work" / f"quality_{kind}"
    work.mkdir(parents=True)
    (work / "metrics.jsonl").write_text("{}\n")
    result = run_suite(output, tmp_path, NANOGPT_DIR="none", PYTHON=str(failing_python(tmp_path)))
    assert result.returncode == 1
    assert "== check: failed, or out of time" in result.stdout  # done on another kind of device is not done
    assert "== quality: done before, skipped" in result.stdout
    assert "error: --nanogpt_dir" in result.stdout
    assert "not finished: check speed;" in result.stderr
    assert not (output / "speed.done").exists()


def failing_python(folder: Path) -> Path:
    """A Python that ends at once where it is asked for gpu_check.py."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase $1 in *gpu_check.py) exit 3 ;; esac\nexec "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_without_torch_it_says_so(tmp_path: Path) -> None:
    no_torch = tmp_path / "python"
    no_torch.write_text("#!/bin/sh\nexit 1\n")
    no_torch.chmod(0o755)
    result = run_suite(tmp_path / "out", tmp_path, PYTHON=str(no_torch))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert not (tmp_path / "out").exists()
