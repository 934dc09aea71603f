"""What is known of CPU, CUDA and MPS devices: their names, how to wait for them, how fast they multiply matrices.

`Clock` stamps the time at which a device reaches a point of the program; `matrix_product_rate` is the peak that a
training step is compared with.
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


EVENTS = ("cuda", "mps")  # device types that run behind the program and stamp the time themselves


def parse_device(device: str | torch.device) -> torch.device:
    """Return a device that is here and can be timed, or raise a ValueError."""
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    try:
        found = torch.device(device)
    except RuntimeError:  # no name of a device
        found = None
    if found is None or not present.get(found.type):
        allowed = [kind for kind, here in present.items() if here]
        raise ValueError(f"device={str(device)!r} is not here or cannot be timed. Allowed: {allowed}.")
    return found


def device_name(device: str | torch.device) -> str:
    """Return the name of a GPU, or of the processor with the number of threads torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()} GPU" if device.type == "mps" else f"{_processor()}, {torch.get_num_threads()} threads"


def local_devices() -> list[str]:
    """Return the names of the devices of this machine that a table can be measured on."""
    gpus = [device_name(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    return [device_name("cpu"), *gpus, *([device_name("mps")] if torch.backends.mps.is_available() else [])]


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@dataclass(frozen=True)
class Clock:
    """Stamps the time at which a device reaches a point of the program, not the time at which the program asks."""

    device: torch.device

    @property
    def _backend(self) -> Any:
        return getattr(torch, self.device.type)

    def synchronize(self) -> None:
        """Wait for what the device still has to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type in EVENTS:
            self._backend.synchronize()

    def stamp(self) -> Any:
        if self.device.type not in EVENTS:
            return time.perf_counter()
        event = self._backend.Event(enable_timing=True)
        # By itself an event goes to the current GPU, which need not be this one.
        event.record(*([torch.cuda.current_stream(self.device)] if self.device.type == "cuda" else []))
        return event

    def intervals(self, stamps: Sequence[Any]) -> np.ndarray:
        """Return the seconds between neighbouring stamps, (stamps - 1,), once the device has reached the last."""
        if self.device.type not in EVENTS:
            return np.diff(stamps)
        self.synchronize()
        return np.array([before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(stamps)])


def matrix_product_rate(device: torch.device, mixed_precision: str = "no", seconds: float = 0.2) -> float:
    """Measure the best rate, in FLOP/s, of a square matrix product on `device` in the precision of training.

    It is the peak that a training step is compared with: what this machine does, not what its data sheet says.
    """
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    size = 8192 if device.type == "cuda" else 1024
    left = torch.ones(size, size, device=device, dtype=dtype)  # ones: training's random state stays untouched
    clock = Clock(device)
    best, deadline = 0.0, time.perf_counter() + seconds
    while best == 0.0 or time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(left, left)
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
