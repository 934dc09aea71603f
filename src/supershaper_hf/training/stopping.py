"""When a run has to stop before its last step: a signal came, or the launcher that started it is gone.

The loop looks at both after each step. It then writes a checkpoint and ends. The same command resumes the run.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ..processes import parent_at_start


@contextmanager
def caught_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT (Ctrl-C) in a list instead of ending the process. A second one acts as usual."""
    caught: list[signal.Signals] = []
    previous: dict[signal.Signals, Any] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, catch)
    except ValueError:
        pass  # Python allows handlers in the main thread only. In other threads signals act as usual.
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Launcher:
    """The `torchrun` or `accelerate launch` that started this process, if there is one.

    A launcher that is killed alone leaves its processes behind. The operating system then gives them another parent
    than the one they had at the start, before the model and the text were loaded.
    """

    def __init__(self) -> None:
        self.process = parent_at_start() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def is_gone(self) -> bool:
        return self.process is not None and os.getppid() != self.process
