"""What torch.compile takes and gives on a CPU: by an earlier run of the same model on this machine, or by default.

torch keeps what it has compiled, by default in the folder for temporary files. A file beside it says of a model and its
batch that it is there, and how much faster a step was.
"""

import contextlib
import getpass
import hashlib
import math
import os
import re
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gptkit.base.files import read_json, write_json
from gptkit.distributed.process_group import main_process
from gptkit.training import cpu_layers
from gptkit.training.guard import as_sum
from gptkit.training.settings import TrainingSettings

# On a CPU of two cores the compiler takes half a minute, or a few seconds where it finds what it made before, and forward and
# backward are then about 1.2 times as fast (benchmarks/compile_gain.py): of a shorter time it would take what it gives.
COMPILING_S, WARM_COMPILING_S, COMPILED_SPEEDUP = 35.0, 6.0, 1.2
WORTH_TIMES = 10.0  # the compiler's time, that a run must have left


@dataclass(frozen=True)
class CompilerGain:
    """The seconds until the first compiled step, and how much faster forward and backward are then."""

    seconds: float = COMPILING_S
    times_as_fast: float = COMPILED_SPEEDUP

    def is_worth(self, left_s: float) -> bool:
        """Return whether a run with so many seconds left gains by it; that of one without a budget is not known."""
        gains = (left_s - self.seconds) * self.times_as_fast > left_s
        return gains and WORTH_TIMES * self.seconds <= left_s < math.inf


@main_process
def expected_gain(dimensions: Any, batch_size: int, dtype: torch.dtype) -> CompilerGain:
    """Return what to expect for a model, by its dimensions (a dataclass), and the sequences of its micro-steps."""
    try:
        times_as_fast = as_sum(read_json(_path(dimensions, batch_size, dtype))["times_as_fast"])
        return CompilerGain(WARM_COMPILING_S, times_as_fast) if times_as_fast > 0 else CompilerGain()
    except (OSError, ValueError, KeyError, TypeError):
        return CompilerGain()


@main_process
def compiles(
    settings: TrainingSettings,
    dimensions: Any,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    left_s: float,
) -> bool:
    """Return whether a session compiles its model: as asked for, on CUDA, or on a CPU where a budget has time for it.

    left_s are the seconds of the budget that remain, infinite without one.
    """
    if settings.compile is not None:
        return settings.compile
    return device.type == "cuda" or (
        device.type == "cpu" and expected_gain(dimensions, batch_size, dtype).is_worth(left_s)
    )


def record_gain(dimensions: Any, batch_size: int, dtype: torch.dtype, times_as_fast: float) -> None:
    """Keep how much faster a compiled step was, for later runs."""
    with contextlib.suppress(OSError):  # they will expect what is usual
        write_json(_path(dimensions, batch_size, dtype), {"times_as_fast": round(times_as_fast, 3)})


def _path(dimensions: Any, batch_size: int, dtype: torch.dtype) -> Path:
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR")  # torch sets it once it has compiled, by default to this
    if folder is None:
        try:
            user = getpass.getuser()
        except (OSError, KeyError, ImportError):  # not everyone has a name
            user = f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
        folder = os.path.join(tempfile.gettempdir(), "torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))
    model = replace(dimensions, drop_rate=0.5 if dimensions.drop_rate else 0.0)  # whatever it is, the code is the same
    sources = [Path(str(sys.modules[module].__file__)) for module in (type(dimensions).__module__, cpu_layers.__name__)]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources))
    digest.update(repr((model, batch_size, dtype, torch.get_num_threads(), torch.__version__)).encode())
    return Path(folder) / f"gptkit_{digest.hexdigest()[:16]}.json"
