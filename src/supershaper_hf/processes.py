"""Several processes in one run: they have to agree on their number, and to stop together if one meets an error.

If one process stops with an error while the others wait for it, they wait for ever. `on_main_process` and
`on_every_process` raise the error of one process on all of them.
"""

import functools
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, get_int_from_env


# Where launchers tell a process how many there are: torchrun and `accelerate launch`; MPI in three implementations.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

Result = TypeVar("Result")


def start_accelerator(**options: Any) -> Accelerator:
    """Return an `Accelerator` that knows all processes that the launcher has started.

    On a machine without a GPU, Accelerate ignores the other processes of `torchrun` or `mpirun` unless it is told to
    use the CPU. Then every process would train on the same data and write to the same folder. Therefore this function
    passes `cpu=True` where there is no GPU.

    Args:
        **options: Arguments of `Accelerator`: `mixed_precision`, `log_with`, `kwargs_handlers`, ...

    Raises:
        RuntimeError: If Accelerate still sees fewer processes than the launcher has started.

    Example:
        >>> start_accelerator().num_processes
        1
    """
    parent_at_start()
    launched = get_int_from_env(WORLD_SIZES, 1)
    if launched > 1 and not torch.accelerator.is_available():
        options = {"cpu": True, **options}
    accelerator = Accelerator(**options)
    if accelerator.num_processes < launched:
        raise RuntimeError(
            f"The launcher has started {launched} processes (WORLD_SIZE, or its name in MPI), but Accelerate sees "
            f"{accelerator.num_processes}. Start them with `accelerate launch` or `torchrun`, and create no "
            "Accelerator or PartialState before this one. To train on CPUs, set ACCELERATE_USE_CPU=true."
        )
    return accelerator


@functools.cache
def parent_at_start() -> int:
    """Return the id of the parent that this process had when this function was first called: its launcher, if any.

    Loading a model and its text may take hours. A launcher that is killed meanwhile is not the parent any more.
    """
    return os.getppid()


def on_main_process(act: Callable[[], Result], accelerator: Accelerator | None) -> Result:
    """Call `act` on the main process, and return its result on every process.

    Args:
        act: The function. If there are several processes, its result has to be picklable.
        accelerator: The processes, all of which have to call this function; `None` for a single one.

    Raises:
        Exception: On every process, the error that `act` has raised on the main process. Where such an error cannot be
            sent to the other processes as it is, they raise a RuntimeError with its type and text.

    Example:
        >>> on_main_process(lambda: 42, accelerator=None)
        42
    """
    if accelerator is None or accelerator.num_processes == 1:
        return act()
    result: Any = None
    error: Exception | None = None
    if accelerator.is_main_process:
        result, error = _outcome(act)
    if error is None and not _can_be_sent(result):
        error = TypeError(f"A {type(result).__name__} cannot be sent to the other processes.")
    sent = broadcast_object_list([None if error is not None else result, _portable(error)])
    if not accelerator.is_main_process:
        result, error = sent
    if error is not None:
        raise error
    return result


def on_every_process(act: Callable[[], Result], accelerator: Accelerator | None) -> Result:
    """Call `act` on every process, and return on each what it has returned there.

    Args:
        act: The function.
        accelerator: The processes, all of which have to call this function; `None` for a single one.

    Raises:
        Exception: On a process where `act` has raised an error, that error. On the others the first of these errors,
            or a RuntimeError with its type and text where it cannot be sent as it is.

    Example:
        >>> on_every_process(lambda: 42, accelerator=None)
        42
    """
    if accelerator is None or accelerator.num_processes == 1:
        return act()
    result, error = _outcome(act)
    errors = [other for other in gather_object([_portable(error)]) if other is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]
    return result


def main_process_first(act: Callable[[], Result], accelerator: Accelerator) -> Result:
    """Call `act` on the main process, then on the others, which then find in a cache what the main one has computed.

    Returns:
        On each process what `act` has returned there.

    Raises:
        Exception: On every process, the error of the first process where `act` has raised one.
    """
    results: list[Result] = []
    if accelerator.num_processes > 1:

        def act_once() -> None:  # its result stays here: it may be too large to send
            results.append(act())

        on_main_process(act_once, accelerator)
    return on_every_process(lambda: results[0] if results else act(), accelerator)


def _outcome(act: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return the result of `act` and the error that it has raised. Ctrl-C is no error: it reaches every process."""
    try:
        return act(), None
    except Exception as error:
        return None, error


def _portable(error: Exception | None) -> Exception | None:
    """Return `error` if another process can read it without a change, else a RuntimeError with its type and text."""
    try:
        read = pickle.loads(pickle.dumps(error))
        same = type(read) is type(error) and str(read) == str(error)
    except Exception:  # its class decides what pickling raises
        same = False
    return error if same else RuntimeError(f"{type(error).__name__}: {error}")


def _can_be_sent(result: Any) -> bool:
    try:
        pickle.loads(pickle.dumps(result))
        return True
    except Exception:  # its class decides what pickling raises
        return False
