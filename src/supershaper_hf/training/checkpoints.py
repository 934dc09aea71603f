"""Checkpoints on disk: complete or absent, checked before they are loaded, and never mixed up with other folders.

    output_dir/checkpoint-00000500/    model.safetensors, optimizer.safetensors, progress.json, configuration, tokenizer
                                       manifest.json: size and SHA-256 of every other file, written last

Only a folder with such a name, of exactly eight digits, and with a manifest that we have written is a checkpoint. No
other folder is ever listed, loaded, replaced or removed. What the files hold is decided in `resuming.py`.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from transformers.utils import logging

from ..files import force_to_disk, read_json, write_folder, write_json
from ..processes import on_main_process


logger = logging.get_logger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "supershaper-hf checkpoint 1"
NAME = re.compile(r"checkpoint-\d{8}")
LEFTOVER = re.compile(r"\.checkpoint-\d{8}\.(partial|old)")  # what a kill leaves of `write_folder`
FREE_SPACE = "Solve the problem (is the disk full?), then start the same command again: it continues from there."


def checkpoint_folder(output_dir: str | Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps."""
    return Path(output_dir) / f"checkpoint-{step:08d}"


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints in `output_dir`, newest first, damaged ones included."""
    return [folder for folder in _folders_named_as_ours(output_dir) if _read_manifest(folder) is not None]


def _folders_named_as_ours(output_dir: str | Path) -> list[Path]:
    return sorted((path for path in Path(output_dir).glob("checkpoint-*") if NAME.fullmatch(path.name)), reverse=True)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the content of a manifest that we have written; `None` for any other folder, file or link."""
    if folder.is_symlink() or (folder / MANIFEST).is_symlink():
        return None
    try:
        return read_json(folder / MANIFEST, MANIFEST_FORMAT)
    except (OSError, ValueError):
        return None


def save_checkpoint(
    accelerator: Accelerator, output_dir: str | Path, step: int, write: Callable[[Path], None], keep: int | None
) -> Path:
    """Write the checkpoint of `step` and remove all but the newest `keep` checkpoints.

    Every process calls this. Only the main one writes; the others wait, and raise the same error.

    Args:
        accelerator: Connects the processes.
        output_dir: Folder of the run.
        step: Number of the last step done.
        write: Called with a temporary folder on the main process, to write the files of the checkpoint.
        keep: Number of checkpoints that stay; `None` removes none.

    Raises:
        OSError: If it cannot be written, for example on a full disk. Older checkpoints are still there.
    """
    folder = checkpoint_folder(output_dir, step)

    def write_and_seal(partial: Path) -> None:
        write(partial)
        seal(partial)

    def save() -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for leftover in folder.parent.glob(".checkpoint-*"):
            if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
        if (folder.exists() or folder.is_symlink()) and _read_manifest(folder) is None:
            raise FileExistsError("something else, without a manifest.json of ours, has this name; move it away")
        write_folder(folder, write_and_seal, replace=True)
        # Later checkpoints were passed over because they are damaged. They must not push out good ones.
        found = list_checkpoints(output_dir)
        later = [path for path in found if path.name > folder.name]
        too_many = [] if keep is None else found[found.index(folder) + keep :]
        for old in later + too_many:
            shutil.rmtree(old)

    def save_or_explain() -> None:
        with explained(folder, lambda: f"{_newest(output_dir)} {FREE_SPACE}"):
            save()

    on_main_process(save_or_explain, accelerator)
    return folder


@contextmanager
def explained(path: Path, advice: Callable[[], str]) -> Iterator[None]:
    """Turn an error in writing `path` into an OSError that names it and says what to do.

    Libraries report a full disk as an OSError, a RuntimeError (torch), a SafetensorError, or a bare Exception
    (tokenizers). Other errors, and a GPU that runs out of memory, pass as they are.
    """
    try:
        yield
    except Exception as error:
        written = isinstance(error, (OSError, RuntimeError, SafetensorError)) or type(error) is Exception
        if not written or isinstance(error, torch.OutOfMemoryError):
            raise
        raise OSError(f"{path} could not be written: {error}. {advice()}") from error


def _newest(output_dir: str | Path) -> str:
    newest = next(iter(list_checkpoints(output_dir)), None)
    return f"The newest checkpoint is {newest}." if newest else "There is no older checkpoint."


def seal(folder: Path) -> None:
    """Write the manifest of sizes and checksums, and force everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest(path)} for path in files
    }
    write_json(folder / MANIFEST, MANIFEST_FORMAT, {"files": entries})
    for path in [*folder.rglob("*"), folder]:
        force_to_disk(path)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest; return what is wrong, or `None` if nothing is."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"it has no {MANIFEST} that we have written, or a damaged one"
    for name, entry in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["size"]:
                return f"{name} has {path.stat().st_size:,} bytes instead of {entry['size']:,}"
            if digest(path) != entry["sha256"]:
                return f"{name} has changed: its checksum is wrong"
        except OSError as error:
            return f"{name} is not readable: {error}"
    return None


def newest_good_checkpoint(accelerator: Accelerator, output_dir: str | Path) -> Path | None:
    """Return the newest undamaged checkpoint in `output_dir`, the same on every process; `None` if there is none.

    Raises:
        ValueError: If there are checkpoints, but all are damaged: to start anew would be a surprise. Also if the
            newest folder with the name of a checkpoint has no manifest: the run would later have to replace it, and
            may not, because somebody else may have made it.
    """
    return on_main_process(lambda: _search(output_dir), accelerator)


def _search(output_dir: str | Path) -> Path | None:
    damage = {}
    for folder in _folders_named_as_ours(output_dir):
        reason = find_damage(folder)
        if reason is None:
            return folder
        if _read_manifest(folder) is None:
            raise ValueError(
                f"{folder} has the name of a checkpoint, but {reason}. Move it to another place, or remove it, then "
                "start again."
            )
        damage[folder] = reason
        logger.warning(f"{folder} is damaged ({reason}): falling back to the checkpoint before it.")
    if damage:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in damage.items())
        raise ValueError(f"No checkpoint can be used. {reasons}. Remove these folders to start from the beginning.")
    return None
