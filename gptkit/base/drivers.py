"""Find out why torch cannot use the NVIDIA GPU of this machine, and which way out fits its driver.

torch itself only prints a warning there and computes on the CPU. What it checks is what the CUDA runtime checks: a
build for CUDA 13.x needs a driver for CUDA 13.0 or newer, one for 12.x a driver for 12.0 or newer (CUDA Compatibility,
"Minor Version Compatibility": https://docs.nvidia.com/deploy/cuda-compatibility/).

torch is imported in the functions that need it: exp001/command.sh asks this module before there is a torch.
"""

import contextlib
import ctypes
import glob
import importlib.util
import os
import re
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path

VERSION_FILE = Path("/proc/driver/nvidia/version")
DEVICE_FILES = "/dev/nvidia[0-9]*"  # also in a container, one for each of its GPUs
HIDDEN = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last one is Slurm's
OLDEST_DRIVERS = {11: 450, 12: 525, 13: 580}  # by CUDA's major version, as above
# PyTorch's wheel indexes whose newest torch is 2.6 or newer (in November 2026: 2.7.1, 2.14, 2.11, 2.15), by the CUDA
# version that a driver needs to have. Those of 12.8 have no kernels for GPUs older than compute capability 7.5, and
# those of 12.6 none for newer ones than 9.0 (PyTorch's RELEASE.md, "PyTorch CUDA Support Matrix"; pytorch/pytorch
# issues 172352, 178665 and 190385).
INDEXES = {(13, 0): "cu130", (12, 8): "cu128", (12, 0): "cu126", (11, 0): "cu118"}
LAST_FOR_OLD_GPUS, OLD_GPUS, TOO_OLD_GPUS = (12, 6), (7, 5), (5, 0)
LAST_PYTHONS = {"cu118": (3, 13)}  # of indexes that get no newer torch: the newest Python that they have wheels for
OR_CPU = "or give --device cpu to use the CPU"


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver of a machine that has a GPU for it."""

    version: str | None  # its own, such as 570.86.10
    cuda: tuple[int, int] | None  # the newest CUDA version that it runs; None where its library cannot be loaded

    def __str__(self) -> str:
        cuda = f"for CUDA {self.cuda[0]}.{self.cuda[1]}" if self.cuda else ""
        return ", ".join(filter(None, (self.version, cuda))) or "of unknown version"


def find_driver() -> Driver | None:
    """Return the NVIDIA driver; None where there is no driver, no GPU for it, or CUDA_VISIBLE_DEVICES hides all GPUs."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip() in HIDDEN:
        return None
    has_device_file = bool(glob.glob(DEVICE_FILES))
    library = _load("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    # A driver's library may be installed where there is no GPU (WSL has no device files, so they alone do not decide).
    if not has_device_file and (library is None or library.cuInit(0) != 0):
        return None
    number = ctypes.c_int()  # 12080 is CUDA 12.8
    if library is None or library.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value <= 0:
        return Driver(_driver_version(), None)
    return Driver(_driver_version(), (number.value // 1000, number.value % 1000 // 10))


def _load(name: str) -> ctypes.CDLL | None:
    with contextlib.suppress(OSError):
        return ctypes.CDLL(name)
    return None


def _driver_version() -> str | None:
    """Return the driver's own version, from the system or else from its management library (NVML)."""
    with contextlib.suppress(OSError):
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", VERSION_FILE.read_text("utf-8"))
        if found:
            return found[1]
    nvml = _load("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
    version = ctypes.create_string_buffer(80)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
    if nvml and nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(version, ctypes.c_uint(80)) == 0:
        return version.value.decode()
    return None


def wheel_index(cuda: tuple[int, int]) -> str | None:
    """Return the newest of PyTorch's wheel indexes for a driver's CUDA version; None where it is too old for all."""
    return next((index for needed, index in INDEXES.items() if cuda >= needed), None)


def is_cuda_available() -> bool:
    """Return whether torch can use CUDA, without torch's warning where it cannot (or AMD's ROCm, which it calls CUDA)."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def gpu_problem(device: str = "auto") -> str | None:
    """Return in one line why torch cannot use the NVIDIA GPU that `device` means, with the ways out.

    None where it can, where there is none, or where `device` is another kind.
    """
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if not match:
        return None
    if importlib.util.find_spec("torch") is None:
        return _future_problem()
    import torch

    if torch.version.hip:
        return None
    if is_cuda_available():
        return _kernels_problem(int(match[1] or 0))
    driver = find_driver()
    if driver is None:
        return None
    cannot = f"torch {torch.__version__} cannot use the NVIDIA GPU of this machine"
    if driver.cuda is None:
        return f"{cannot}: {_library_problem(driver)}"
    if torch.version.cuda is None:
        return f"{cannot}: it is built without CUDA, and the driver is {driver}; {_installation(driver.cuda)}, {OR_CPU}"
    needed = int(torch.version.cuda.partition(".")[0])
    if driver.cuda >= (needed, 0):
        error, visible = _cuda_error(), os.environ.get("CUDA_VISIBLE_DEVICES")
        remedy = "restart the machine, choose another host"
        if visible is not None and re.match("Error 10[01]:|No CUDA GPUs", error):  # no device, an invalid device
            remedy = f"check CUDA_VISIBLE_DEVICES={visible}"
        return f"{cannot}, whose driver ({driver}) is new enough: {error}; {remedy}, {OR_CPU}"
    oldest = f" ({OLDEST_DRIVERS[needed]} or newer)" if needed in OLDEST_DRIVERS else ""
    return (
        f"{cannot}: it is built for CUDA {torch.version.cuda} and needs a driver for CUDA {needed}.0 or newer{oldest},"
        f" and the driver is {driver}; choose a host with a newer driver, {_installation(driver.cuda)}, {OR_CPU}"
    )


def _library_problem(driver: Driver) -> str:
    return (
        f"the library of its driver ({driver}) cannot be loaded; install that"
        f" (start a container with docker run --gpus all), {OR_CPU}"
    )


def _future_problem() -> str | None:
    """Return why the torch that pip would install here could not use the GPU: the newest one needs the newest CUDA."""
    driver, needed = find_driver(), max(INDEXES)
    if driver is None or (driver.cuda and driver.cuda >= needed):
        return None
    if driver.cuda is None:
        return (
            f"there is no torch here yet, and none could use the NVIDIA GPU of this machine: {_library_problem(driver)}"
        )
    return (
        f"there is no torch here yet, and the newest one needs a driver for CUDA {needed[0]}.{needed[1]} or newer, and"
        f" the driver is {driver}; choose a host with a newer driver, {_installation(driver.cuda)}, {OR_CPU}"
    )


def _installation(cuda: tuple[int, int]) -> str:
    """Return what installs the build of torch for this CUDA version, or updates the driver where there is none."""
    index = wheel_index(cuda)
    if index is None or sys.version_info[:2] > LAST_PYTHONS.get(index, sys.version_info[:2]):
        return "update the driver"
    python, first = sys.executable, ""
    if sys.prefix == sys.base_prefix and Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists():  # PEP 668
        first = f"{python} -m venv --system-site-packages .venv in the root of the repository, then "
        python = os.path.join(".venv", "Scripts" if os.name == "nt" else "bin", "python")
    elif importlib.util.find_spec("pip") is None:  # an environment that uv made
        first = f"{python} -m ensurepip, then "
    # pip keeps a torch that is there, also one that an environment sees of the system, unless it is forced.
    force = "--force-reinstall " if importlib.util.find_spec("torch") else ""
    return f"run {first}{python} -m pip install {force}torch --index-url https://download.pytorch.org/whl/{index}"


def _cuda_error() -> str:
    """Return what torch reports when it starts CUDA."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.init()
    except Exception as error:  # RuntimeError, AssertionError
        text = " ".join(str(error).split())
        return text[max(text.find("Error "), 0) :].rstrip(".")  # behind a question that is not for users
    return "torch.cuda.is_available() is false"


def _kernels_problem(index: int) -> str | None:
    """Return why torch cannot compute on a GPU that it sees: it is older, or newer, than those it has kernels for."""
    import torch

    if index >= torch.cuda.device_count():
        return None  # for the caller to report
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        capability = torch.cuda.get_device_capability(index)
        architectures, name = torch.cuda.get_arch_list(), torch.cuda.get_device_name(index)
    if not architectures or any(_runs(architecture, capability) for architecture in architectures):
        return None
    driver = find_driver()
    cuda = driver.cuda if driver and driver.cuda else (12, 8)
    remedy = _installation(min(cuda, LAST_FOR_OLD_GPUS) if capability < OLD_GPUS else cuda)
    return (
        f"torch {torch.__version__} has no kernels for {name}, of compute capability {capability[0]}.{capability[1]}"
        f" (it has {', '.join(architectures)}); choose another GPU, "
        + (OR_CPU if capability < TOO_OLD_GPUS else f"{remedy}, {OR_CPU}")
    )


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    """Return whether a GPU runs kernels for an architecture such as sm_86 or compute_90.

    Machine code (sm) runs on the same major and any later minor capability, PTX (compute) on any later one, and that of
    an architecture with a letter on this one alone (CUDA C++ Programming Guide, "Application Compatibility").
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", architecture)
    if not match:
        return True  # of a kind that is not known here: let torch decide
    kind, built_for = match[1], (int(match[2]), int(match[3]))
    if match[4] == "a":
        return capability == built_for
    return capability >= built_for and (kind == "compute" or capability[0] == built_for[0])
