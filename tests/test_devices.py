"""Devices are found, named, waited for and timed, on a machine that has none but its processor."""

import re

import numpy as np
import pytest
import torch

from supershaper_hf import devices
from supershaper_hf.devices import Clock, device_name, local_devices, matrix_product_rate, parse_device


# Names


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.fixture
def processor_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_devices_of_this_machine_are_accepted(processor_only, two_gpus, apple):
    for name in ("cpu", "cuda", "cuda:0", "cuda:1", "mps", "mps:0"):
        assert parse_device(name) == parse_device(torch.device(name)) == torch.device(name)


@pytest.mark.parametrize(
    "device", ["cuda", "cuda:0", "mps", "meta", "xla", "gpu", "", "cpu:1", None, torch.device("cuda")]
)
def test_device_that_this_machine_does_not_have_is_refused(device, processor_only):
    message = f"device={str(device)!r} is not available on this machine. Allowed: ['cpu']."
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_device(device)


@pytest.mark.parametrize("device", ["cuda:2", "mps:1", "meta"])
def test_refusal_lists_the_devices_of_this_machine(device, processor_only, two_gpus, apple):
    with pytest.raises(ValueError, match=re.escape("Allowed: ['cpu', 'cuda:0', 'cuda:1', 'mps:0'].")):
        parse_device(device)


def test_every_device_has_a_name(processor_only, two_gpus, apple):
    assert device_name("cpu").endswith(f", {torch.get_num_threads()} threads")
    assert device_name("mps") == device_name("cpu").rsplit(",", 1)[0] + " GPU"
    assert local_devices() == [device_name("cpu"), "GPU 0", "GPU 1", device_name("mps")]


def test_processor_alone_is_a_local_device(processor_only):
    assert local_devices() == [device_name(torch.device("cpu"))]


# The clock


class FakeGPU:
    """Stands for `torch.mps` or `torch.cuda`: its queue holds one second of work for each event and product.

    It reads the time of an event, in milliseconds, only after it was waited for.
    """

    def __init__(self):
        self.queued, self.done, self.synchronized = 0.0, 0.0, []
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self, stream=None):
                gpu.queued += 1.0
                self.time, self.stream = gpu.queued, stream

            def elapsed_time(self, end):
                assert gpu.done >= end.time
                return end.time**2 - self.time**2

        self.Event = Event

    def synchronize(self, device=None):
        self.done = self.queued
        self.synchronized.append(device)

    def current_stream(self, device):
        return f"stream of {device}"


@pytest.mark.parametrize("device", ["mps", "cuda:1"])
def test_gpu_is_waited_for_before_its_stamps_are_read(device, monkeypatch):
    gpu = FakeGPU()
    monkeypatch.setattr(torch, torch.device(device).type, gpu)
    clock = Clock(torch.device(device))
    clock.synchronize()
    assert len(gpu.synchronized) == 1
    stamps = [clock.stamp() for _ in range(3)]
    np.testing.assert_allclose(clock.intervals(stamps), [0.003, 0.005])
    if device == "cuda:1":  # otherwise the current GPU, which may be another one
        assert gpu.synchronized == [torch.device(device)] * 2
        assert {stamp.stream for stamp in stamps} == {"stream of cuda:1"}


def test_processor_is_timed_by_the_program(monkeypatch):
    monkeypatch.setattr(devices.time, "perf_counter", iter([1.0, 3.0, 6.0]).__next__)
    clock = Clock(torch.device("cpu"))
    clock.synchronize()
    np.testing.assert_array_equal(clock.intervals([clock.stamp() for _ in range(3)]), [2.0, 3.0])


# The rate of matrix products


def test_rate_of_matrix_products_is_positive():
    assert 1e7 < matrix_product_rate(torch.device("cpu"), seconds=0.0) < 1e15


@pytest.mark.parametrize(
    ("precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_rate_is_measured_in_the_precision_of_training(monkeypatch, precision, dtype):
    seen = set()
    monkeypatch.setattr(torch, "mm", lambda *factors: seen.update(factor.dtype for factor in factors))
    matrix_product_rate(torch.device("cpu"), precision, seconds=0.0)
    assert seen == {dtype}


def test_measuring_the_rate_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    matrix_product_rate(torch.device("cpu"), seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_rate_counts_two_operations_for_each_multiplication(monkeypatch):
    """A clock that moves one second at each look: the product of two 1024 x 1024 matrices takes one."""
    monkeypatch.setattr(devices.time, "perf_counter", iter(range(100)).__next__)
    assert matrix_product_rate(torch.device("cpu"), seconds=5) == 2 * 1024**3


def test_rate_is_the_best_of_all_tries(monkeypatch):
    # Start; then for each try: is there time left, before, after.
    clock = iter([0.0, 0.0, 4.0, 4.0, 4.0, 6.0, 6.0, 6.0, 7.0, 9.0])
    monkeypatch.setattr(devices.time, "perf_counter", clock.__next__)
    assert matrix_product_rate(torch.device("cpu"), seconds=8) == 2 * 1024**3 / 1.0


@pytest.mark.parametrize("device", ["mps", "cuda"])
def test_rate_counts_the_time_until_the_gpu_is_done(device, monkeypatch):
    """Queueing the work takes no time at all. The first product, which also loads the library, does not count."""
    gpu = FakeGPU()
    dtypes = []

    def queue(left, right):
        gpu.queued += 10.0 if not dtypes else 2.0
        dtypes.append(left.dtype)

    ones = torch.ones
    monkeypatch.setattr(torch, device, gpu)
    monkeypatch.setattr(torch, "mm", queue)
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(1, dtype=dtype))
    monkeypatch.setattr(devices.time, "perf_counter", lambda: gpu.done)
    rate = matrix_product_rate(torch.device(device), seconds=5)
    assert rate == 2 * {"mps": 1024, "cuda": 8192}[device] ** 3 / 2.0
    assert set(dtypes) == {torch.float32}  # MPS has no float64
    assert len(dtypes) == 1 + 3


@pytest.mark.parametrize("precision", ["fp8", "float32", None])
def test_rate_in_another_precision_is_refused(precision):
    message = re.escape(f"mixed_precision={precision!r} is unknown. Allowed: 'no', 'bf16', 'fp16'.")
    with pytest.raises(ValueError, match=message):
        matrix_product_rate(torch.device("cpu"), precision)
