"""Files and folders on disk: they are complete or absent, have one writer, and are checked when they are read.

`write_file` and `write_folder` never leave half of anything behind. `lock` makes sure that one run at a time writes to
a place. `write_json` and `read_json` are the only writer and the only reader of our JSON files.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


# Files and folders that appear complete or not at all


def check_output_folder(folder: str | Path) -> Path:
    """Return `folder` as a path if it does not exist yet, or is an empty folder.

    Raises:
        FileExistsError: If it is a file, or a folder that is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder. Choose another one or remove it first.")
    return folder


def write_file(file: str | Path, text: str) -> Path:
    """Write `text` to a temporary file beside `file`, force it to the disk, and rename it.

    A crash leaves the old file or the new one. What a crash left of the temporary file is removed, and never followed:
    a symbolic link that stands in its place is not written through.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    with partial.open("x", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
    force_to_disk(file.parent)
    return file


def write_folder(folder: str | Path, write: Callable[[Path], None], replace: bool = False) -> Path:
    """Let `write` fill a temporary folder beside `folder`, then rename it.

    A crash leaves the old folder or the new one: either under its own name or, between two renames, as
    `.<name>.old`. The next call puts such a folder back first. A `folder` that is a symbolic link to a folder stays
    one; what it points to is replaced.

    Args:
        folder: Where the new folder appears.
        write: Called with the temporary folder.
        replace: Whether a folder that is already there gives way to the new one, once that is complete.

    Raises:
        FileExistsError: If `replace` is not set and `folder` is not empty.
    """
    folder = Path(folder)
    if folder.is_symlink():
        folder = folder.resolve()
    partial, old = (folder.with_name(f".{folder.name}.{state}") for state in ("partial", "old"))
    recover_folder(folder)
    if not replace:
        check_output_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    partial.mkdir()
    try:
        write(partial)
        make_readable(partial)
        if replace and folder.exists():
            folder.replace(old)
        partial.replace(folder)
    finally:
        recover_folder(folder)
        _remove(partial)
    force_to_disk(folder.parent)
    return folder


def recover_folder(folder: str | Path) -> None:
    """Finish what a crash in `write_folder` left undone: put the old folder back if there is no new one, else remove it."""
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}.old")
    if not old.exists():
        return
    if folder.exists():
        _remove(old)
    else:
        old.replace(folder)


def make_readable(folder: Path) -> None:
    """Give every file in `folder` the permissions of a new file: some libraries write theirs for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~umask)


def force_to_disk(path: Path) -> None:
    """Return when the file or folder `path` survives a power cut."""
    if os.name == "nt":  # Windows opens no folders; it writes their entries by itself
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Remove a file, a symbolic link (not what it points to), or a folder, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


# One writer at a time


@contextmanager
def lock(place: str | Path) -> Iterator[None]:
    """Hold `place`, a file or a folder that is written to, for this process alone.

    The operating system frees the lock when the process ends, however it ends. The lock file `.<name>.lock` beside a
    file, or `.lock` inside a folder, stays behind and means nothing by itself.

    Raises:
        RuntimeError: If another process, or another call in this one, holds it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock(folder):
        ...     print("only we write here")
        only we write here
    """
    place = Path(place)
    file = place / ".lock" if place.is_dir() else place.with_name(f".{place.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(file, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise RuntimeError(
            f"{place} is in use by another run. Wait until that one has ended, or choose another place for this one."
        ) from None
    try:
        yield
    finally:
        held.release()


# JSON


def write_json(file: str | Path, kind: str, content: Mapping[str, Any]) -> Path:
    """Write `content` as JSON, one key a line, together with its `kind` and a checksum. See `read_json`.

    Args:
        file: Where to write it.
        kind: What the file holds and which version of it, such as `"supershaper-hf predictor 2"`.
        content: Values that JSON knows. Numbers have to be finite.

    Raises:
        ValueError: If a number is not finite.
    """
    lines = {"format": kind, "checksum": checksum(content), **content}
    body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in lines.items())
    return write_file(file, f"{{\n{body}\n}}\n")


def read_json(file: str | Path, kind: str) -> dict[str, Any]:
    """Read the content of a file that `write_json` has written.

    Args:
        file: The file.
        kind: As given to `write_json`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not JSON, holds something else or another version of it, or was changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_json(Path(folder) / "answer.json", "answer 1", {"answer": 42})
        ...     read_json(file, "answer 1")
        {'answer': 42}
    """
    content = parse_json(Path(file).read_bytes(), str(file))
    if not isinstance(content, dict) or content.get("format") != kind:
        found = repr(content.get("format")) if isinstance(content, dict) else "no object"
        raise ValueError(f"{file} is not a {kind!r} file: its format is {found}. Write it again with this version.")
    del content["format"]
    if content.pop("checksum", None) != checksum(content):
        raise ValueError(f"{file} is damaged or was edited: its checksum is wrong. Remove it, or write it again.")
    return content


def parse_json(text: str | bytes, name: str) -> Any:
    """Return the value of a JSON text. `NaN` and `Infinity`, which are not JSON, are refused.

    Raises:
        ValueError: If it is not JSON. The message starts with `name`.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{name} is not JSON that we have written: it is nested too deeply.") from None
    except ValueError as error:  # also a byte that is not UTF-8
        raise ValueError(f"{name} is not JSON: {error}. It is damaged, or holds something else.") from None


def checksum(content: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a JSON value. The order of keys does not matter."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON, with null for numbers that are not finite: JSON has none."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)
