"""Output folders and files that appear complete or not at all."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def check_output_folder(folder: str | Path) -> Path:
    """Return `folder` as a path if it can be written to without touching anything that is there.

    Raises:
        FileExistsError: If it is a file or a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another one or remove it first.")
    return folder


def write_file(file: str | Path, text: str) -> Path:
    """Write `text` to a temporary file beside `file`, force it to the disk and rename it: a crash keeps the old."""
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    return partial.replace(file)


def write_folder(folder: str | Path, write: Callable[[Path], None], replace: bool = False) -> Path:
    """Let `write` fill a temporary folder beside `folder`, then rename it: a crash leaves no half-written `folder`.

    With `replace`, a folder that is already there gives way to the new one once that is complete.
    """
    folder = Path(folder) if replace else check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        if replace and folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.replace(old)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return folder
