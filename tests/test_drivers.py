"""gptkit/base/drivers.py: a GPU that torch cannot use is an error in one line, with the ways out.

The driver is a library of a few lines in C, which real processes load as they would load NVIDIA's. That torch is built
for CUDA is pretended: the build that really is takes gigabytes.
"""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_user_error, environment

from gptkit.base import devices, drivers
from gptkit.base.cli import UserError
from gptkit.distributed import process_group

CUDA_SOURCE = """
#include <stdlib.h>
int cuInit(unsigned flags) { return atoi(getenv("STUB_INIT")); }
int cuDriverGetVersion(int *version) { *version = atoi(getenv("STUB_CUDA")); return 0; }
"""
NVML_SOURCE = """
#include <string.h>
int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) { strncpy(version, "570.86.10", length); return 0; }
"""
# Run a script as if torch were built for CUDA 13.0: the arguments are the script and its own.
PRETEND = """
import os, runpy, sys, torch
torch.version.cuda, torch.__version__ = "13.0", "2.14.1"
del sys.argv[0]
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
CPU = "--device cpu to use the CPU"


def index_url(index: str, python: str = sys.executable, force: str = "--force-reinstall ") -> str:
    return f"{python} -m pip install {force}torch --index-url https://download.pytorch.org/whl/{index}, "


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the libraries of a driver, for LD_LIBRARY_PATH."""
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("the stand-in for a driver is made by gcc on Linux")
    folder = tmp_path_factory.mktemp("driver")
    for name, source in (("libcuda.so.1", CUDA_SOURCE), ("libnvidia-ml.so.1", NVML_SOURCE)):
        compiler = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(compiler, input=source, text=True, check=True)
    return folder


def with_driver(driver: Path, cuda: int = 12080, init: int = 0) -> dict[str, str]:
    """Return the environment of a process on a machine with this driver."""
    variables = {"LD_LIBRARY_PATH": str(driver), "STUB_CUDA": str(cuda), "STUB_INIT": str(init)}
    return {name: value for name, value in environment().items() if name != "CUDA_VISIBLE_DEVICES"} | variables


def run_pretending(variables: dict[str, str], *arguments: object) -> subprocess.CompletedProcess:
    """Run a script under that environment, with a torch that is built for CUDA 13.0."""
    command = [sys.executable, "-c", PRETEND, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, encoding="utf-8", timeout=100)


COMMANDS = {
    "inference.py": ("--exp_dir", "EXP", "--prompt", "春"),
    "evaluate_model.py": ("--exp_dir", "EXP", "--text_path", "dataset/sample/sample.jsonl", "--max_chars", 100),
    "demo.py": ("--exp_dir", "EXP"),
    "benchmarks/memory.py": ("--device", "auto"),
}


@pytest.mark.parametrize("script", COMMANDS)
def test_each_command_names_the_driver_and_the_ways_out(script: str, driver: Path, poem: tuple[Path, str]) -> None:
    arguments = [poem[0] if value == "EXP" else value for value in COMMANDS[script]]
    result = run_pretending(with_driver(driver), script, *arguments)
    ways = ("choose a host with a newer driver", index_url("cu128"), CPU)
    facts = ("torch 2.14.1", "built for CUDA 13.0", "580 or newer", "the driver is 570.86.10, for CUDA 12.8")
    assert_user_error(result, "--device auto", *facts, *ways)
    assert len(result.stderr.splitlines()) == 1


def test_pretraining_stops_before_it_writes_anything(tmp_path: Path, driver: Path, short_shards: Path) -> None:
    model = ("--tokenizer", "sentencepiece", "--tokenizer_path", "dataset/sample/tokenizer", "--model_size", "nano")
    output = ("--data_dir", short_shards, "--use_pretokenized", "--output_dir", tmp_path / "run")
    result = run_pretending(with_driver(driver), "pretraining.py", *model, *output)
    assert_user_error(result, "--device auto", "for CUDA 12.8")
    assert not (tmp_path / "run").exists()
    result = run_pretending(with_driver(driver), "pretraining.py", *model, *output, "--device", "cuda")
    assert_user_error(result, "--device cuda: ", "for CUDA 12.8")


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_none(driver: Path, poem: tuple[Path, str], hidden: str) -> None:
    variables = with_driver(driver) | {"CUDA_VISIBLE_DEVICES": hidden}
    result = run_pretending(variables, "inference.py", "--exp_dir", poem[0], "--prompt", "春", "--max_new_tokens", 1)
    assert result.returncode == 0, result.stderr


def test_who_insists_gets_the_cpu(driver: Path, poem: tuple[Path, str]) -> None:
    arguments = ("--exp_dir", poem[0], "--prompt", "春", "--max_new_tokens", 1, "--device", "cpu")
    result = run_pretending(with_driver(driver), "inference.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert " on cpu, " in result.stderr


@pytest.fixture
def this_driver(driver: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Give this process the driver, for CUDA 12.8, and a torch that is built for CUDA 13.0."""
    for name, value in with_driver(driver).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(drivers, "_load", lambda name: ctypes.CDLL(str(driver / name)))
    monkeypatch.setattr(drivers, "is_cuda_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    return monkeypatch


def problem() -> str:
    return drivers.gpu_problem() or ""


def test_without_a_driver_or_a_gpu_there_is_no_problem(this_driver: pytest.MonkeyPatch) -> None:
    assert problem()
    this_driver.setenv("STUB_INIT", "100")  # CUDA_ERROR_NO_DEVICE: a driver without a GPU
    assert not problem()
    this_driver.setenv("STUB_INIT", "0")
    this_driver.setattr(drivers, "_load", lambda name: None)
    assert not problem()
    this_driver.setattr(torch.version, "cuda", None)
    assert not problem()


def test_the_torch_that_would_be_installed_is_checked_too(this_driver: pytest.MonkeyPatch) -> None:
    this_driver.setattr(importlib.util, "find_spec", lambda name: name == "pip" or None)
    expected = (
        "the newest one needs a driver for CUDA 13.0 or newer, and the driver is 570.86.10, for CUDA 12.8; choose"
    )
    command = index_url("cu128", force="")
    assert f"there is no torch here yet, and {expected} a host with a newer driver, run {command}" in problem()
    this_driver.setenv("STUB_CUDA", "13000")
    assert not problem()
    this_driver.setattr(drivers, "find_driver", lambda: drivers.Driver("580.95.05", None))
    expected = "none could use the NVIDIA GPU of this machine: the library of its driver (580.95.05) cannot be loaded;"
    assert f"there is no torch here yet, and {expected} install that" in problem()


def test_where_the_system_manages_python_the_command_is_one_that_pip_accepts(
    this_driver: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    this_driver.setattr(sys, "base_prefix", sys.prefix)
    this_driver.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert f"run {index_url('cu128')}" in problem()
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    first = f"{sys.executable} -m venv --system-site-packages .venv in the root of the repository"
    assert f"run {first}, then {index_url('cu128', '.venv/bin/python')}" in problem()
    this_driver.setattr(sys, "base_prefix", "/usr")
    assert f"run {index_url('cu128')}" in problem()


def test_an_environment_without_pip_gets_it_first(this_driver: pytest.MonkeyPatch) -> None:
    this_driver.setattr(importlib.util, "find_spec", lambda name: name == "torch" or None)
    assert f"run {sys.executable} -m ensurepip, then {index_url('cu128')}" in problem()


def test_a_torch_for_amd_is_left_alone(this_driver: pytest.MonkeyPatch) -> None:
    this_driver.setattr(torch.version, "cuda", None)
    this_driver.setattr(torch.version, "hip", "6.4")
    assert not problem()


@pytest.mark.parametrize(("cuda", "index"), [(11040, "cu118"), (12000, "cu126"), (12070, "cu126"), (12090, "cu128")])
def test_the_index_is_one_that_the_driver_can_run(this_driver: pytest.MonkeyPatch, cuda: int, index: str) -> None:
    this_driver.setattr(sys, "version_info", (3, 13, 0))
    this_driver.setenv("STUB_CUDA", str(cuda))
    assert index_url(index) in problem()


def test_a_driver_that_no_build_supports_has_to_be_updated(this_driver: pytest.MonkeyPatch) -> None:
    this_driver.setenv("STUB_CUDA", "10020")
    assert "for CUDA 10.2; choose a host with a newer driver, update the driver, or give --device cpu" in problem()
    this_driver.setenv("STUB_CUDA", "11080")
    this_driver.setattr(sys, "version_info", (3, 14, 0))
    assert "for CUDA 11.8; choose a host with a newer driver, update the driver, or give --device cpu" in problem()


def test_a_torch_without_cuda_leaves_a_gpu_idle(this_driver: pytest.MonkeyPatch) -> None:
    this_driver.setattr(torch.version, "cuda", None)
    this_driver.setenv("STUB_CUDA", "13000")
    expected = f"it is built without CUDA, and the driver is 570.86.10, for CUDA 13.0; run {index_url('cu130')}or"
    assert expected in problem()


def test_a_driver_that_is_new_enough_and_fails_has_torch_explain(this_driver: pytest.MonkeyPatch) -> None:
    """CUDA's minor versions are compatible: a build for 12.8 runs with a driver for 12.0."""
    this_driver.setattr(torch.version, "cuda", "12.8")
    this_driver.setenv("STUB_CUDA", "12000")

    def init() -> None:
        raise RuntimeError(
            "Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling"
            " NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"
        )

    this_driver.setattr(torch.cuda, "init", init)
    expected = "whose driver (570.86.10, for CUDA 12.0) is new enough: Error 802: system not yet initialized; restart"
    assert expected in problem()
    this_driver.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert expected in problem()


@pytest.mark.parametrize("visible", ["7", "none", "void"])
def test_an_invalid_choice_of_gpus_is_named(this_driver: pytest.MonkeyPatch, visible: str) -> None:
    this_driver.setenv("STUB_CUDA", "13000")
    this_driver.setattr(drivers, "_cuda_error", lambda: "No CUDA GPUs are available")
    assert "is new enough: No CUDA GPUs are available; restart the machine" in problem()
    this_driver.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"No CUDA GPUs are available; check CUDA_VISIBLE_DEVICES={visible}, or give {CPU}" in problem()


def test_a_gpu_without_the_drivers_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is in a container that was given the host's devices and not its driver."""
    (tmp_path / "nvidia2").touch()
    (tmp_path / "version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (root@host)\n"
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(drivers, "DEVICE_FILES", str(tmp_path / "nvidia[0-9]*"))
    monkeypatch.setattr(drivers, "VERSION_FILE", tmp_path / "version")
    monkeypatch.setattr(drivers, "_load", lambda name: None)
    monkeypatch.setattr(drivers, "is_cuda_available", lambda: False)
    with pytest.raises(UserError, match=r"library of its driver \(580\.95\.05\) cannot be loaded; .*--gpus all"):
        devices.choose_device("auto")
    assert devices.choose_device("cpu").type == "cpu"


def test_several_processes_report_it_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun, each process has a GPU of its own; none of them may take the CPU silently."""
    monkeypatch.setattr(process_group, "world_size", lambda: 2)
    monkeypatch.setattr(drivers, "is_cuda_available", lambda: False)
    assert process_group.device_of_rank("auto") == "cpu"
    monkeypatch.setattr(drivers, "gpu_problem", lambda device="auto": "it is broken")
    with pytest.raises(UserError, match="--device auto: it is broken"):
        devices.choose_device(process_group.device_of_rank("auto"))


P100, V100, T4, A40, H100, B300, RTX5090 = (6, 0), (7, 0), (7, 5), (8, 6), (9, 0), (10, 3), (12, 0)
CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU128 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: tuple[str, ...]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))


@pytest.mark.parametrize(
    ("architectures", "runs"),
    [
        (CU126, (P100, V100, T4, A40, (8, 9), H100)),
        (CU128, (T4, A40, (8, 9), H100, B300, RTX5090, (12, 1))),
        (("sm_80", "sm_100a"), (A40,)),
        (("sm_80", "sm_90a"), (A40, H100)),
        (("sm_75", "compute_80"), (T4, A40, H100, B300, RTX5090)),
        ((), (P100, V100, T4, A40, H100, B300, RTX5090)),  # torch does not report it
    ],
)
def test_kernels_run_on_later_minor_capabilities_and_ptx_on_all_later(
    architectures: tuple[str, ...], runs: tuple[tuple[int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drivers, "find_driver", lambda: drivers.Driver("570.86.10", (12, 8)))
    for capability in {*runs, P100, V100, T4, A40, H100, B300, RTX5090}:
        pretend_gpu(monkeypatch, capability, architectures)
        assert (drivers.gpu_problem() is None) == (capability in runs), capability


@pytest.mark.parametrize(
    ("capability", "architectures", "cuda", "index"),
    [
        (P100, CU128, (13, 0), "cu126"),
        (V100, CU128, (12, 8), "cu126"),
        (P100, CU128, (11, 4), "cu118"),
        (RTX5090, CU126, (12, 8), "cu128"),
        (RTX5090, CU126, (13, 0), "cu130"),
    ],
)
def test_a_gpu_without_kernels_is_named_with_the_build_that_has_them(
    capability: tuple[int, int],
    architectures: tuple[str, ...],
    cuda: tuple[int, int],
    index: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(drivers, "find_driver", lambda: drivers.Driver("570.86.10", cuda))
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    pretend_gpu(monkeypatch, capability, architectures)
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(UserError) as caught:
            devices.choose_device(name)
        message = str(caught.value)
        assert f"--device {name}: torch {torch.__version__} has no kernels for a GPU, of compute capability" in message
        assert f"{capability[0]}.{capability[1]} (it has {', '.join(architectures)})" in message
        assert f"choose another GPU, run {index_url(index)}or give {CPU}" in message
    with pytest.raises(UserError, match="it has 1 CUDA"):
        devices.choose_device("cuda:1")


def test_a_gpu_that_is_too_old_for_all_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "find_driver", lambda: None)
    pretend_gpu(monkeypatch, (3, 7), CU126)
    message = drivers.gpu_problem() or ""
    assert message.endswith("choose another GPU, or give --device cpu to use the CPU")


def test_torchs_warning_is_not_printed(monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder) -> None:
    def is_available() -> bool:
        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.choose_device("auto").type in ("cpu", "mps")
    assert not recwarn.list
