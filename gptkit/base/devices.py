"""The device to run on, the precision of its products, its memory and its random streams."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Mapping
from typing import Literal

import torch

from gptkit.base import drivers
from gptkit.base.cli import UserError

# Dense products of 16-bit numbers on tensor cores, in 1e12 operations a second, from the vendors' data sheets, by a word
# of the device's name (the first match counts): bfloat16 and float16 alike, but for the last two, which have only
# float16. Laptop GPUs of the same name are other chips.
HALF_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A40": 150,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX A6000": 155,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's, from glibc's malloc.h
LARGEST_FROM_HEAP = 32 << 20  # the most that every glibc takes as M_MMAP_THRESHOLD on 64 bits (mallopt(3))
NEVER = 2**31 - 1
NO_MEMORY = ("can't allocate memory", "DefaultCPUAllocator: not enough memory", "MPS backend out of memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA, then MPS, then the CPU.

    Raises UserError where it is missing, and where there is an NVIDIA GPU that torch cannot use.
    """
    problem = drivers.gpu_problem(name)
    if problem:
        raise UserError(f"--device {name}: {problem}")
    available = {"cuda": drivers.is_cuda_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; give auto, cpu, cuda, cuda:N or mps")
    kind = device.type
    if not available.get(kind, False):
        raise UserError(
            f"--device {name} is not on this machine; it has {', '.join(k for k, v in available.items() if v)}"
        )
    if kind == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not on this machine; it has {torch.cuda.device_count()} CUDA device(s)")
    return device


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device is known to multiply bfloat16 itself; emulated it is slower than float32.

    NVIDIA's do from compute capability 8.0 on (Ampere; CUDA C++ Programming Guide, "Compute Capabilities"), and AMD's
    count higher. Untried and so left out: ARM's CPUs, and MPS.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        can: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # old versions of torch lack it
        return bool(can.get("avx512_bf16") or can.get("amx_bf16"))
    return False


def multiplies_only_float16(device: torch.device) -> bool:
    """Return whether the device is known to multiply float16 fast, and bfloat16 not: NVIDIA's Volta and Turing.

    Those are V100, T4, RTX 20 and GTX 16, of compute capability 7.x. Older ones are left out: most of Pascal multiplies
    float16 at 1/64 of float32's rate (CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions").
    """
    return device.type == "cuda" and (7, 0) <= torch.cuda.get_device_capability(device) < (8, 0)


def choose_dtype(name: str, device: torch.device, training: bool = False) -> torch.dtype:
    """Return the type of the matrix products; "auto" is the 16-bit type that the device multiplies fast, or float32.

    bfloat16 is preferred: it has float32's range. On a CPU it is chosen only for a training run, its validation
    included, whose float32 weights average the rounding out. inference.py and evaluate_model.py use float32 there: a
    text must not depend on the kind of CPU.
    """
    if name == "auto":
        if (training or device.type != "cpu") and multiplies_bfloat16(device):
            name = "bfloat16"
        else:
            name = "float16" if multiplies_only_float16(device) else "float32"
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return what --dtype calls a type."""
    return str(dtype).removeprefix("torch.")


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """Compute matrix products in `dtype`; weights and sums stay in float32. Does nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def describe_device(device: torch.device) -> str:
    """Return the device's name with its memory, or with its threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads"


def format_mfu(flops_per_s: float, device: torch.device, dtype: torch.dtype) -> str:
    """Return the share of the device's peak, such as "45.1%" (MFU: PaLM, appendix B); n/a where its peak is unknown."""
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for model, tflops in HALF_TFLOPS.items():
            if re.search(rf"\b{model}\b(?! Laptop)", name):
                return f"{flops_per_s / (tflops * 1e12):.1%}"
    return "n/a"


def keep_freed_memory(device: torch.device, trim_threshold: int = NEVER) -> None:
    """Let a process that trains on the CPU keep freed memory for its next tensors (glibc; elsewhere nothing is done).

    By default glibc returns the top of its heap to the system above 64 MiB. Each step then maps tens of thousands of
    new pages, which takes a tenth of its time in models of a few million parameters. trim_threshold is in bytes.
    """
    if device.type == "cpu" and sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGEST_FROM_HEAP)
            mallopt(M_TRIM_THRESHOLD, trim_threshold)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of tensors on a CUDA device, elsewhere of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # on Windows
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts KiB on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def synchronize(device: torch.device) -> None:
    """Wait for what was started on the device, so that a clock that is read afterwards includes it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that device or host memory ran out.

    The allocators of the CPU (its Windows form says "not enough memory") and of MPS raise a RuntimeError.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def get_rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random streams that training draws from (dropout), as uint8 tensors random.<kind>."""
    states = {"random.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["random.cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["random.mps"] = torch.mps.get_rng_state()
    return states


def set_rng_states(tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    """Set the states that get_rng_states returned; other tensors and states of other devices are ignored."""
    torch.set_rng_state(tensors["random.cpu"].cpu())
    if device.type == "cuda" and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"].cpu(), device)
    if device.type == "mps" and "random.mps" in tensors:
        torch.mps.set_rng_state(tensors["random.mps"].cpu())
