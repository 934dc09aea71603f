"""Output folders that appear complete or not at all."""

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


def write_folder(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write` fill a temporary folder beside `folder`, then rename it: a crash leaves no half-written `folder`."""
    folder = check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
