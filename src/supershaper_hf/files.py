"""Files and folders on disk: they are complete or absent, have one writer, and are checked when they are read.

`write_file` and `write_folder` never leave half a file or half a folder behind. `lock` lets only one run at a time
write to a place. `write_json` and `read_json` write and read our JSON files.
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

    A crash leaves the old file or the new one. The temporary file is always a new one: whatever has its name is removed
    first, so a symbolic link that somebody has put there is not followed.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a full disk does not name the file
            error.filename = str(file)
        raise
    force_to_disk(file.parent)
    return file


def write_folder(folder: str | Path, write: Callable[[Path], None], replace: bool = False) -> Path:
    """Let `write` fill a temporary folder beside `folder`, force it to the disk, and rename it.

    An error, Ctrl-C or a crash at any moment leaves the complete old folder or the complete new one. After a crash
    between the two renames that a replacement needs, the old folder is called `.<name>.old`; `recover_folder`, with
    which the next call starts, puts it back. A `folder` that is a symbolic link stays one: the folder that it points to
    is replaced. Only one process at a time may write a folder: see `lock`.

    Args:
        folder: Where the new folder appears.
        write: Called with the path of the temporary folder.
        replace: Whether the new folder replaces one that is already there.

    Raises:
        FileExistsError: If `folder` is a file, or is not empty and `replace` is not set.
        ValueError: If `folder` is the current working directory.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     folder = write_folder(Path(parent) / "new", lambda partial: partial.joinpath("a.txt").touch())
        ...     [file.name for file in folder.iterdir()]
        ['a.txt']
    """
    folder = Path(folder)
    target = folder.resolve()
    recover_folder(target)
    if not replace or not target.is_dir():
        check_output_folder(folder)
    if target.exists() and target.samefile(os.curdir):
        raise ValueError(f"{folder} is the current working directory, which cannot be renamed. Choose another folder.")
    partial, old = _temporary_names(target)
    try:
        partial.mkdir(parents=True)
        write(partial)
        make_readable(partial)
        for path in [*partial.rglob("*"), partial]:
            if not path.is_symlink():
                force_to_disk(path)
        if replace and target.exists():
            target.replace(old)
        partial.replace(target)
        force_to_disk(target.parent)
    finally:
        recover_folder(target)
    return folder


def recover_folder(folder: str | Path) -> None:
    """Clean up after a `write_folder` that was interrupted: afterwards `folder` is complete, or was never written.

    Raises:
        FileExistsError: If the old folder has to be put back, but something else has taken its place since the crash.
    """
    folder = Path(folder).resolve()
    partial, old = _temporary_names(folder)
    if old.is_dir() and not old.is_symlink():
        vacant = not any(folder.iterdir()) if folder.is_dir() else not folder.exists()
        if vacant:
            if folder.exists():
                folder.rmdir()
            old.replace(folder)
        elif partial.exists():  # the crash came before the second rename, so `old` is the only copy of what was there
            raise FileExistsError(
                f"A crash interrupted the replacement of {folder}. What it held before is in {old}, but {folder} has "
                "been written again since. Move one of the two away."
            )
        else:
            old.replace(partial)  # a removal takes time: what is only partly removed must not be called `old`
    _remove(partial)


def _temporary_names(folder: Path) -> tuple[Path, Path]:
    """Return the names of the new folder while it is written, and of the old one while it is replaced."""
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")


def make_readable(folder: Path) -> None:
    """Give all files in `folder` the permissions of a new file: some libraries let nobody but the owner read theirs."""
    sample = folder / ".permissions"
    sample.touch()
    mode = sample.stat().st_mode & 0o777
    sample.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


def force_to_disk(path: Path) -> None:
    """Return when the file or folder `path` would survive a power cut."""
    if os.name == "nt":  # Windows cannot open folders, and writes their entries without being asked
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
    """Make this process the only one that writes to `place`, an existing folder or any file.

    The operating system releases the lock when the process ends, even if it is killed. What remains is an empty file:
    `.lock` in a folder, `.<name>.lock` beside a file. This file alone does not block the next run.

    Args:
        place: The folder or file. A place that does not exist is taken for a file, so create a folder first.

    Raises:
        RuntimeError: If another process, or another call in this process, holds the lock.
        OSError: If the lock file cannot be written, or its file system knows no locks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock(folder):
        ...     print("No other process writes here now.")
        No other process writes here now.
    """
    path = Path(place).resolve()  # two names of one place have one lock
    file = path / ".lock" if path.is_dir() else path.with_name(f".{path.name}.lock")
    file.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(file, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise RuntimeError(
            f"{place} is in use by another run. Wait until that run has ended, or choose another place for this one."
        ) from None
    try:
        yield
    finally:
        held.release()


# JSON


def write_json(file: str | Path, kind: str, content: Mapping[str, Any]) -> Path:
    """Write `content` as JSON, one key a line, together with its `kind` and a checksum. `read_json` reads it.

    Args:
        file: Where to write it.
        kind: What the file holds and in which version of the format, such as `"supershaper-hf predictor 2"`.
        content: Values that JSON knows. All numbers have to be finite.

    Raises:
        TypeError: If a value is of a type that JSON does not know.
        ValueError: If a number is not finite, or a key is `"format"` or `"checksum"`.
    """
    reserved = {"format", "checksum"} & content.keys()
    if reserved:
        raise ValueError(f"{file}: the keys {sorted(reserved)} belong to the file format. Choose other names.")
    lines = []
    for key, value in {"format": kind, "checksum": checksum(content), **_as_read(content)}.items():
        try:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        except ValueError:
            raise ValueError(f"{file}: {key!r} holds a number that is not finite, which JSON does not know.") from None
    body = ",\n".join(lines)
    return write_file(file, f"{{\n{body}\n}}\n")


def read_json(file: str | Path, kind: str) -> dict[str, Any]:
    """Read the content of a file that `write_json` has written.

    Args:
        file: The file.
        kind: What `write_json` was given.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not JSON, is of another kind or version, or was changed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_json(Path(folder) / "answer.json", "answer 1", {"answer": 42})
        ...     read_json(file, "answer 1")
        {'answer': 42}
    """
    content = parse_json(Path(file).read_bytes(), str(file))
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != kind:
        shown = repr(found[:80]) if isinstance(found, str) else "missing"
        raise ValueError(
            f"{file} is not a {kind!r} file: its format is {shown}. It holds something else, or another version of "
            "supershaper-hf has written it."
        )
    if content.pop("checksum", None) != checksum(content):
        raise ValueError(f"{file} is damaged or was edited: its checksum is wrong. Remove it, or write it again.")
    return content


def parse_json(text: str | bytes, name: str) -> Any:
    """Return the value of a JSON text.

    Numbers that are not finite and keys that occur twice are refused: the JSON standard knows neither, but Python
    accepts them without a word.

    Args:
        text: The JSON text. Bytes are decoded as UTF-8.
        name: What the text is, for the error message, such as the name of its file.

    Raises:
        ValueError: If `text` is not JSON.

    Example:
        >>> parse_json('{"loss": NaN}', "line 7")
        Traceback (most recent call last):
        ValueError: line 7 is not JSON: NaN is not a finite number. It is damaged, or holds something else.
    """

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number[:20]} is not a finite number")
        return float(number)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, parse_constant=finite, parse_float=finite, object_pairs_hook=unique)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # also a byte that is not UTF-8, and an integer of thousands of digits
        reason = str(error)
    raise ValueError(f"{name} is not JSON: {reason}. It is damaged, or holds something else.")


def checksum(content: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a value that JSON knows. The order of keys does not matter."""
    text = json.dumps(_as_read(content), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_read(content: Any) -> Any:
    """Return what reading gives back: every key is a string, which sorts 10 before 9, and tuples are lists."""
    return json.loads(json.dumps(content))


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON, with null in place of numbers that are not finite, which JSON does not know."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {key: finite(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(finite(value), indent=indent, allow_nan=False)
