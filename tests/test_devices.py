"""gptkit/base/devices.py: the precision for each kind of device, and that training uses it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import call_command, curve, newest, small_run

from gptkit.base import devices

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def as_if(monkeypatch: pytest.MonkeyPatch, cpu: dict[str, Any], *cuda: tuple[int, int]) -> None:
    """Pretend that the CPU has these instructions, and each GPU this compute capability."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: cuda[device.index or 0])


@pytest.mark.parametrize(
    ("capabilities", "multiplies"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),  # AMD from Zen 4 on
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, False),  # oneDNN would emulate it
        ({"architecture": "aarch64", "bf16": True}, False),  # untried
        ({}, False),
    ],
)
def test_a_cpu_trains_in_bfloat16_where_it_multiplies_it(
    capabilities: dict[str, Any], multiplies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if(monkeypatch, capabilities)
    assert devices.multiplies_bfloat16(CPU) is multiplies
    assert devices.choose_dtype("auto", CPU, training=True) == (torch.bfloat16 if multiplies else torch.float32)
    assert devices.choose_dtype("auto", CPU) == torch.float32  # generation and evaluation


def test_a_torch_that_does_not_report_it_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert devices.choose_dtype("auto", CPU, training=True) == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_gets_float16_if_it_multiplies_that(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A T4, for which torch reports bfloat16 support, a V100, a Pascal, slow in float16; an A100 and an H100."""
    as_if(monkeypatch, {"avx512_bf16": True}, (7, 5), (7, 0), (6, 1), (8, 0), (9, 0))
    chosen = [devices.choose_dtype("auto", torch.device("cuda", i), training) for i in range(5)]
    assert chosen == [torch.float16, torch.float16, torch.float32, torch.bfloat16, torch.bfloat16]
    assert devices.choose_dtype("auto", CUDA, training) == torch.float16
    assert devices.choose_dtype("auto", MPS, training) == torch.float32


def test_the_dtype_asked_for_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    as_if(monkeypatch, {"avx512_bf16": True}, (8, 0))
    for device in (CPU, CUDA, MPS):
        for training in (True, False):
            assert devices.choose_dtype("float32", device, training) == torch.float32
            assert devices.choose_dtype("bfloat16", device, training) == torch.bfloat16
            assert devices.choose_dtype("float16", device, training) == torch.float16


def test_a_run_uses_what_the_cpu_can(tmp_path: Path, short_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It also prints that; weights and the optimizer's state stay in float32, and a stopped run ends in the same bytes."""
    whole, stopped, plain = (tmp_path / name for name in ("whole", "stopped", "plain"))

    def run(output: Path, multiplies: bool, *more: object) -> tuple[str, str]:
        as_if(monkeypatch, {"avx512_bf16": multiplies})
        result = call_command("pretraining.py", *small_run(short_shards, output, "muon"), "--max_steps", 20, *more)
        assert result.returncode == 0, result.stderr
        return result.stdout, result.stderr

    assert ", torch.float32, " in run(plain, multiplies=False)[0]
    assert ", torch.bfloat16, " in run(whole, multiplies=True)[0]
    run(stopped, True, "--max_minutes", 1e-5)
    assert "note: --dtype" not in run(stopped, True)[1]
    moved = run(plain, True, "--max_steps", 21)[1]
    assert "note: --dtype was float32 and is bfloat16: it holds from step 20 on" in moved
    for file in ("model.safetensors", "training.safetensors"):
        assert (newest(stopped) / file).read_bytes() == (newest(whole) / file).read_bytes(), file
        assert (newest(plain) / file).stat().st_size == (newest(whole) / file).stat().st_size
    losses = [[report["val_loss"] for report in curve(output)[:2]] for output in (whole, plain)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.01)
    assert (
        json.loads((whole / "sessions.jsonl").read_text("utf-8").splitlines()[0])["environment"]["dtype"] == "bfloat16"
    )
