"""Devices: what they are called, how to wait for them, and how fast they multiply matrices.

This file is the only one that knows how CPU, CUDA and MPS (Apple GPUs) differ. MPS has no float64 tensors, so no
function here creates one.
"""

import itertools
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checks import check_choice


# The program queues work for these devices and does not wait. Their events record when the device reaches them.
ASYNCHRONOUS = ("cuda", "mps")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_device(device: str | torch.device) -> torch.device:
    """Return `device` if this machine has it and this package can measure times on it.

    Raises:
        ValueError: If it cannot be used.

    Example:
        >>> parse_device("cpu")
        device(type='cpu')
    """
    numbers = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):  # it is not the name of a device
        found = None
    if found is None or (found.index or 0) >= numbers.get(found.type, 0):
        allowed = ["cpu", *(f"{kind}:{index}" for kind in ("cuda", "mps") for index in range(numbers[kind]))]
        raise ValueError(f"device={str(device)!r} is not available on this machine. Allowed: {allowed}.")
    return found


def device_name(device: str | torch.device) -> str:
    """Return the name of a GPU, or of the processor together with the number of threads that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} GPU" if device.type == "mps" else f"{_processor()}, {torch.get_num_threads()} threads"


def local_devices() -> list[str]:
    """Return the names of all devices of this machine on which times can be measured."""
    gpus = [device_name(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    return [device_name("cpu"), *gpus, *([device_name("mps")] if torch.backends.mps.is_available() else [])]


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which many numbers are added on a device: float64, or float32 where there is no float64.

    Example:
        >>> summing_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64


@dataclass(frozen=True)
class Clock:
    """Records the times at which a device reaches points of the program.

    A GPU reaches a point later than the program does, which only queues its work.

    Example:
        >>> clock = Clock(torch.device("cpu"))
        >>> stamps = [clock.stamp() for _ in range(3)]
        >>> clock.intervals(stamps).shape
        (2,)
    """

    device: torch.device

    def synchronize(self) -> None:
        """Wait until the device has done all work in its queue."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type in ASYNCHRONOUS:
            self._backend.synchronize()

    def stamp(self) -> Any:
        """Return a time stamp for `intervals`: the time itself, or an event that the device will reach."""
        if self.device.type not in ASYNCHRONOUS:
            return time.perf_counter()
        event = self._backend.Event(enable_timing=True)
        # Without a stream, an event goes to the current GPU, which may be another one.
        event.record(*([torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []))
        return event

    def intervals(self, stamps: Sequence[Any]) -> np.ndarray:
        """Return the seconds between neighbouring stamps, (stamps - 1,), after the device has reached the last one."""
        if self.device.type not in ASYNCHRONOUS:
            return np.diff(stamps)
        self.synchronize()
        return np.array([before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(stamps)])

    @property
    def _backend(self) -> Any:
        return getattr(torch, self.device.type)


def matrix_product_rate(device: torch.device, mixed_precision: str = "no", seconds: float = 0.2) -> float:
    """Measure the highest rate, in FLOP/s, at which `device` multiplies square matrices.

    Progress of training is shown as a share of this rate. Unlike the rate in a data sheet it can be reached.

    Args:
        device: The device.
        mixed_precision: Precision of training, which is that of the matrices: `"no"` (float32), `"bf16"` or `"fp16"`.
        seconds: Time to spend. At least one product is measured.

    Raises:
        ValueError: If `mixed_precision` is another one, such as `"fp8"`.

    Example:
        >>> matrix_product_rate(torch.device("cpu"), seconds=0.0) > 0
        True
    """
    check_choice("mixed_precision", mixed_precision, PRECISIONS)
    size = 8192 if device.type == "cuda" else 1024
    factor = torch.ones(size, size, device=device, dtype=PRECISIONS[mixed_precision])  # leaves the random state alone
    clock = Clock(device)
    torch.mm(factor, factor)  # the first product also loads the library
    clock.synchronize()
    best, deadline = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(factor, factor)
        clock.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def copy_mapped_weights(model: torch.nn.Module) -> None:
    """Copy every weight on the CPU that is still mapped to its file into memory, in place.

    `from_pretrained` maps `model.safetensors` into memory instead of reading it. While it is mapped, a change of the
    file changes the model, and a process that reads beyond the end of a shortened file is killed (SIGBUS). A mapped
    weight also begins at any byte, and the rounding of a matrix product depends on that.

    The copies take as much memory as the weights. Weights in memory that torch has allocated are not copied.
    """
    for weight in itertools.chain(model.parameters(), model.buffers()):
        if weight.device.type != "cpu" or hasattr(weight, "full_tensor"):  # FSDP has copied its shards already
            continue
        if not weight.untyped_storage().resizable():  # torch resizes only memory that it has allocated
            weight.data = weight.data.clone()
