"""When a session is compiled, and what an earlier one on this machine found out about that."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gpt_model import GPTConfig
from gptkit.training import compiler_gain
from gptkit.training.compiler_gain import (
    COMPILING_S,
    WARM_COMPILING_S,
    CompilerGain,
    compiles,
    expected_gain,
    record_gain,
)
from gptkit.training.settings import TrainingSettings

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODEL = GPTConfig(vocab_size=8, context_length=4, emb_dim=4, n_layers=1, n_heads=1)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the compiler keep what it makes in a folder of the test's own."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("compile", "device", "left_s", "expected"),
    [
        (None, CUDA, 20.0, True),
        (None, CUDA, math.inf, True),
        (None, CPU, 349.0, False),
        (None, CPU, 350.0, True),
        (None, CPU, math.inf, False),  # without a budget
        (None, torch.device("mps"), 3600.0, False),
        (True, CPU, 20.0, True),
        (False, CPU, 3600.0, False),
        (False, CUDA, math.inf, False),
    ],
)
def test_where_a_model_is_compiled(compile: bool | None, device: torch.device, left_s: float, expected: bool) -> None:
    settings = TrainingSettings(data_dir="text", compile=compile)
    assert compiles(settings, MODEL, 8, device, torch.float32, left_s) == expected


def test_what_was_compiled_here_before_is_worth_it_sooner() -> None:
    assert expected_gain(MODEL, 8, torch.float32) == CompilerGain() == CompilerGain(COMPILING_S, 1.2)
    record_gain(MODEL, 8, torch.float32, 1.3)
    assert expected_gain(MODEL, 8, torch.float32) == CompilerGain(WARM_COMPILING_S, 1.3)
    assert (
        expected_gain(replace(MODEL, drop_rate=0.1), 8, torch.float32) == CompilerGain()
    )  # dropout is more to compile
    record_gain(replace(MODEL, drop_rate=0.1), 8, torch.float32, 1.2)
    assert expected_gain(replace(MODEL, drop_rate=0.2), 8, torch.float32) == CompilerGain(WARM_COMPILING_S, 1.2)
    settings = TrainingSettings(data_dir="text")
    assert compiles(settings, MODEL, 8, CPU, torch.float32, 60.0)
    for other in ((replace(MODEL, emb_dim=8), 8, torch.float32), (MODEL, 4, torch.float32), (MODEL, 8, torch.bfloat16)):
        assert expected_gain(*other) == CompilerGain()
        assert not compiles(settings, *other[:2], CPU, other[2], 60.0)


@pytest.mark.parametrize(
    ("times_as_fast", "left_s", "expected"), [(0.98, 3600.0, False), (1.04, 60.0, False), (1.04, 600.0, True)]
)
def test_a_compiler_that_gives_too_little_is_not_used_again(
    times_as_fast: float, left_s: float, expected: bool
) -> None:
    record_gain(MODEL, 8, torch.float32, times_as_fast)
    assert compiles(TrainingSettings(data_dir="text"), MODEL, 8, CPU, torch.float32, left_s) == expected
    assert compiles(TrainingSettings(data_dir="text", compile=True), MODEL, 8, CPU, torch.float32, 3600.0)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"times_as_fast": "x"}', '{"times_as_fast": Infinity}', '{"times_as_fast": 0}']
)
def test_a_damaged_record_is_none(folder: Path, content: str) -> None:
    record_gain(MODEL, 8, torch.float32, 1.3)
    (path,) = folder.iterdir()
    path.write_text(content)
    assert expected_gain(MODEL, 8, torch.float32) == CompilerGain()


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "file"))
    record_gain(MODEL, 8, torch.float32, 1.3)
    assert expected_gain(MODEL, 8, torch.float32) == CompilerGain()


def test_the_folder_is_that_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir_utils = pytest.importorskip("torch._inductor.runtime.cache_dir_utils")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    ours = compiler_gain._path(MODEL, 8, torch.float32).parent
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # torch sets it; monkeypatch restores it
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert str(ours) == cache_dir_utils.default_cache_dir()
