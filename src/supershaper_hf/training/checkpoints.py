"""How a run survives: checkpoints that are complete or absent, checked before they are loaded, and signals.

    output_dir/checkpoint-00000500/    model, optimiser, scheduler, scaler, random states, data position
                                       manifest.json: size and SHA-256 of every other file, written last

A checkpoint is written to a hidden folder and renamed when all of it is on disk.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from types import FrameType
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
PREFIX = "checkpoint-"


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, write: Callable[[Path], None], keep: int
) -> Path:
    """Write `output_dir/checkpoint-<step>` and remove all but the newest `keep` checkpoints.

    Called by every process. All of them write into one folder, which several machines therefore have to share.

    Args:
        accelerator: Its `save_state` is part of the checkpoint.
        output_dir: Folder of the run.
        step: Number of the last step done.
        write: Called with the folder on every process, to write what else belongs to the checkpoint.
        keep: How many checkpoints stay.

    Raises:
        OSError: If it cannot be written, for example on a full disk. Older checkpoints are still there.
    """
    output_dir = Path(output_dir)
    folder = output_dir / f"{PREFIX}{step:08d}"
    partial = output_dir / f".{folder.name}.partial"
    try:
        if accelerator.is_main_process:
            for leftover in output_dir.glob(f".{PREFIX}*.partial"):  # of a kill
                shutil.rmtree(leftover)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        # It reports each tied weight that it leaves out. They are tied again on loading.
        with muted("accelerate.utils.other"):
            accelerator.save_state(str(partial))
        write(partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            seal(partial)
            shutil.rmtree(folder, ignore_errors=True)  # only a damaged one can be in the way
            partial.replace(folder)
            force_to_disk(output_dir)
            # Later ones were passed over as damaged: they must not push out good ones.
            found = list_checkpoints(output_dir)
            for old in [path for path in found if path.name > folder.name] + found[found.index(folder) + keep :]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is each of them, by who writes
        shutil.rmtree(partial, ignore_errors=True)
        newest = next(iter(list_checkpoints(output_dir)), None)
        raise OSError(
            f"{folder} could not be written: {error}. "
            + (f"The newest checkpoint is {newest}. " if newest else "There is no older checkpoint. ")
            + "Solve that (is the disk full?), then start the same command again: it goes on from there."
        ) from error
    accelerator.wait_for_everyone()
    return folder


@contextmanager
def muted(name: str) -> Iterator[None]:
    noisy = getLogger(name)
    level = noisy.level
    noisy.setLevel(ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoint folders in `output_dir`, newest first."""
    return sorted(Path(output_dir).glob(f"{PREFIX}*"), reverse=True)


def seal(folder: Path) -> None:
    """Write the manifest of sizes and checksums, and force everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest(path)} for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for path in [*folder.rglob("*"), folder]:
        force_to_disk(path)


def force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest; return what is wrong, or `None` if nothing is."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    for name, (size, checksum) in expected.items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if digest(path) != checksum:
                return f"{name} has changed: its checksum is wrong"
        except OSError as error:
            return f"{name} is not readable: {error}"
    return None


def newest_good_checkpoint(accelerator: Accelerator, output_dir: str | Path) -> Path | None:
    """Return the newest undamaged checkpoint in `output_dir`, the same on every process; `None` if there is none.

    Raises:
        ValueError: If there are checkpoints, but all are damaged: starting anew would be a surprise.
    """
    answer: list[str | None] = [None, None]
    if accelerator.is_main_process:
        damage = {}
        for folder in list_checkpoints(output_dir):
            reason = find_damage(folder)
            if reason is None:
                answer[0] = str(folder)
                break
            damage[folder] = reason
            logger.warning(f"{folder} is damaged ({reason}): falling back to the checkpoint before it.")
        if damage and answer[0] is None:
            answer[1] = "; ".join(f"{folder}: {reason}" for folder, reason in damage.items())
    broadcast_object_list(answer)
    if answer[1] is not None:
        raise ValueError(f"No checkpoint can be used. {answer[1]}. Remove these folders to start from the beginning.")
    return None if answer[0] is None else Path(answer[0])


@contextmanager
def caught_signals() -> Iterator[list[str]]:
    """Collect the names of SIGTERM and SIGINT instead of dying at once; a second one acts as it always does."""
    caught: list[str] = []
    previous: dict[signal.Signals, Any] = {}

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, previous[signal.Signals(number)])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, catch)
    except ValueError:
        pass  # not the main thread, where Python allows no handlers: signals act as they always do
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
