"""A crash at any moment loses nothing, a second writer is refused, and a damaged file is never believed."""

import json
import math
import os
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from supershaper_hf import files
from supershaper_hf.files import (
    check_output_folder,
    checksum,
    force_to_disk,
    lock,
    make_readable,
    parse_json,
    read_json,
    recover_folder,
    to_json,
    write_file,
    write_folder,
    write_json,
)


OPERATIONS = ["chmod", "fsync", "mkdir", "open", "rename", "replace", "rmdir", "symlink", "unlink", "utime"]


class Break:
    """Raise an error at one operation on files of this process, or at every one from there on.

    The second leaves on the disk what a SIGKILL before that operation leaves.
    """

    def __init__(self, at, error, for_good=False):
        self.at, self.error, self.for_good = at, error, for_good
        self.count = 0

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        for name in OPERATIONS:
            self._patch.setattr(os, name, self._breaking(getattr(os, name)))
        return self

    def __exit__(self, *error):
        self._patch.undo()

    @property
    def happened(self):
        return self.count > self.at

    def _breaking(self, operation):
        def broken(*args, **kwargs):
            self.count += 1
            if self.count - 1 == self.at or (self.for_good and self.happened):
                raise self.error
            return operation(*args, **kwargs)

        return broken


def every_break(error=KeyboardInterrupt, for_good=False):
    """Yield a `Break` for each operation on files of the code that the caller puts into it, one after the other."""
    for at in range(1000):
        breaking = Break(at, error, for_good)
        yield breaking
        if not breaking.happened:
            assert at > 3
            return
    raise AssertionError("There is no end to it.")


def write_two_files(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")


def crash_after_one_file(folder):
    (folder / "config.json").write_text("{}")
    raise RuntimeError("disk full")


OLD = {"config.json": "old", "weights/first": "old", "weights/second": "old"}
NEW = {"config.json": "new", "weights/first": "new"}


def writer(files):
    """Return a function that writes `files`, path -> text, into a folder."""

    def write(folder):
        for name, text in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return write


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


# Folders


def test_folder_appears_complete(tmp_path):
    folder = write_folder(tmp_path / "new" / "subnet", write_two_files)
    assert folder == tmp_path / "new" / "subnet"
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert list(folder.parent.iterdir()) == [folder]


def test_folder_appears_only_after_the_last_file(tmp_path):
    def write(partial):
        write_two_files(partial)
        assert not (tmp_path / "subnet").exists()

    write_folder(tmp_path / "subnet", write)


def test_empty_folder_is_filled(tmp_path):
    assert len(list(write_folder(tmp_path, write_two_files).iterdir())) == 2


def test_crash_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="disk full"):
        write_folder(tmp_path / "subnet", crash_after_one_file)
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_run_are_replaced(tmp_path):
    leftovers = tmp_path / ".subnet.partial"
    leftovers.mkdir()
    (leftovers / "old").touch()
    assert not (write_folder(tmp_path / "subnet", write_two_files) / "old").exists()
    assert not leftovers.exists()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("occupied", ["file", "file/config.json"], ids=["file", "folder"])
def test_occupied_path_is_refused_before_anything_is_written(occupied, replace, tmp_path):
    (tmp_path / occupied).parent.mkdir(exist_ok=True)
    (tmp_path / occupied).touch()
    if replace and occupied != "file":
        write_folder(tmp_path / "file", write_two_files, replace)
        assert len(list((tmp_path / "file").iterdir())) == 2
        return
    with pytest.raises(FileExistsError, match=r"file exists and is not an empty folder\. Choose another one"):
        write_folder(tmp_path / "file", crash_after_one_file, replace)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("name", ["missing", ""])
def test_missing_or_empty_folder_is_accepted(name, tmp_path):
    assert check_output_folder(str(tmp_path / name)) == tmp_path / name


def test_current_working_directory_is_refused(tmp_path, monkeypatch):
    """Renamed away under the program, every relative path would lead nowhere."""
    monkeypatch.chdir(tmp_path)
    for name in (".", tmp_path):
        with pytest.raises(ValueError, match=r"is the current working directory, .* Choose another folder"):
            write_folder(name, write_two_files)
    assert list(tmp_path.iterdir()) == []


def test_old_folder_is_there_until_the_new_one_is_complete(tmp_path):
    writer(OLD)(tmp_path / "best")

    def write(partial):
        writer(NEW)(partial)
        assert contents(tmp_path / "best") == OLD

    write_folder(tmp_path / "best", write, replace=True)
    assert contents(tmp_path / "best") == NEW
    assert list(tmp_path.iterdir()) == [tmp_path / "best"]


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "killed"])
@pytest.mark.parametrize("start", ["missing", "empty", "full", "link"])
def test_no_interruption_loses_a_folder(start, for_good, tmp_path):
    """An error, Ctrl-C or a SIGKILL before any operation on files, then a call that fails, then one that does not."""
    before = OLD if start in ("full", "link") else {}
    for breaking in every_break(for_good=for_good):
        parent = tmp_path / str(breaking.at)
        real = parent / ("elsewhere" if start == "link" else "best")
        parent.mkdir()
        if start != "missing":
            real.mkdir()
            writer(before)(real)
        if start == "link":
            (parent / "best").symlink_to("elsewhere")
        try:
            with breaking:
                write_folder(parent / "best", writer(NEW), replace=True)
        except KeyboardInterrupt:
            assert breaking.happened
        with pytest.raises(RuntimeError, match="disk full"):
            write_folder(parent / "best", crash_after_one_file, replace=True)
        assert contents(parent / "best") in (before, NEW)
        assert {path.name for path in parent.iterdir()} <= {"best", real.name}
        write_folder(parent / "best", writer({"third": "3"}), replace=True)
        assert contents(real) == {"third": "3"}
        assert {path.name for path in parent.iterdir()} == {"best", real.name}
        assert (parent / "best").is_symlink() == (start == "link")


def killed_between_the_renames(parent):
    """Return what `write_folder` leaves when it is killed after the first of its two renames."""
    for breaking in every_break(for_good=True):
        folder = parent / str(breaking.at) / "best"
        writer(OLD)(folder)
        with pytest.raises(KeyboardInterrupt), breaking:
            write_folder(folder, writer(NEW), replace=True)
        if not folder.exists():
            return folder
    raise AssertionError("There is no such moment.")


def test_folder_is_put_back_after_a_kill_between_the_renames(tmp_path):
    folder = killed_between_the_renames(tmp_path)
    recover_folder(folder)
    assert contents(folder) == OLD
    assert list(folder.parent.iterdir()) == [folder]


def test_empty_folder_in_its_place_does_not_push_out_the_only_copy(tmp_path):
    folder = killed_between_the_renames(tmp_path)
    folder.mkdir()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        write_folder(folder, writer(NEW))
    assert contents(folder) == OLD


def test_folder_of_somebody_else_in_its_place_does_not_push_out_the_only_copy(tmp_path):
    folder = killed_between_the_renames(tmp_path)
    writer({"notes.txt": "mine"})(folder)
    for _ in range(2):
        with pytest.raises(FileExistsError, match=r"What it held before is in .*\.best\.old, .* Move one of the two"):
            write_folder(folder, writer(NEW), replace=True)
    assert contents(folder) == {"notes.txt": "mine"}
    assert contents(folder.with_name(".best.old")) == OLD


def test_half_removed_old_folder_is_never_put_back(tmp_path):
    """After a kill while the old folder is removed, somebody may remove the new one: nothing is better than half."""
    for breaking in every_break(for_good=True):
        folder = tmp_path / str(breaking.at) / "best"
        writer(OLD)(folder)
        try:
            with breaking:
                write_folder(folder, writer(NEW), replace=True)
        except KeyboardInterrupt:
            pass
        if folder.exists() and contents(folder) == NEW:
            for path in sorted(folder.rglob("*"), reverse=True):
                path.rmdir() if path.is_dir() else path.unlink()
            folder.rmdir()
        recover_folder(folder)
        assert not folder.exists() or contents(folder) == OLD


def test_new_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power cut could leave its name on empty files, and the old folder gone."""
    done = []
    monkeypatch.setattr(files, "force_to_disk", lambda path: done.append(path.name))
    monkeypatch.setattr(Path, "replace", lambda path, target: (done.append(target.name), os.replace(path, target)))
    write_folder(tmp_path / "best", writer(NEW))
    assert set(done[: done.index("best")]) == {"config.json", "weights", "first", ".best.partial"}
    assert done[done.index("best") + 1] == tmp_path.name


def test_everybody_may_read_what_may_be_read(tmp_path):
    """Safetensors lets only the owner read its files; a link's target is not ours."""
    outside = tmp_path / "outside"
    outside.touch(mode=0o600)

    def write(partial):
        (partial / "new").touch()
        for name in ("model-00001-of-00002.safetensors", "inner/model.safetensors"):
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).touch(mode=0o600)
        (partial / "link").symlink_to(outside)

    folder = write_folder(tmp_path / "subnet", write)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}
    expected = modes[folder / "new"]
    assert expected & 0o044 == 0o044
    assert modes.pop(folder / "link") == 0o600
    assert set(modes.values()) == {expected}
    make_readable(folder)
    assert len(modes) == 3
    force_to_disk(folder)


# Files


def test_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    file = tmp_path / "front.json"
    assert write_file(file, "första\n") == file
    assert file.read_bytes() == "första\n".encode()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_file(file, "second, but cut off")
    assert file.read_bytes() == "första\n".encode()
    monkeypatch.undo()
    write_file(file, "third\n")
    assert [path.name for path in tmp_path.iterdir()] == ["front.json"]
    assert file.read_text() == "third\n"


@pytest.mark.parametrize("for_good", [False, True], ids=["once", "killed"])
@pytest.mark.parametrize("before", [None, "old"])
def test_no_interruption_loses_a_file(before, for_good, tmp_path):
    for breaking in every_break(for_good=for_good):
        file = tmp_path / str(breaking.at) / "front.json"
        file.parent.mkdir()
        if before is not None:
            file.write_text(before)
        try:
            with breaking:
                write_file(file, "new")
        except KeyboardInterrupt:
            assert breaking.happened
        assert (file.read_text() if file.exists() else None) in (before, "new")
        if not for_good:
            assert {path.name for path in file.parent.iterdir()} <= {"front.json"}
        write_file(file, "third")
        assert file.read_text() == "third"
        assert list(file.parent.iterdir()) == [file]


def test_planted_link_is_not_written_through(tmp_path):
    """Neither one in the place of the temporary file nor one in the place of the file itself."""
    precious = tmp_path / "precious"
    precious.write_text("mine")
    file = tmp_path / "folder" / "front.json"
    file.parent.mkdir()
    for name in (".front.json.partial", "front.json"):
        (file.parent / name).symlink_to(precious)
    write_file(file, "new")
    assert precious.read_text() == "mine"
    assert file.read_text() == "new"
    assert not file.is_symlink()


# One writer


HOLD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
with files.lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holds(place):
    """A process that holds a lock until this one ends it; it loads files.py alone, which takes a moment only."""
    command = [sys.executable, "-c", HOLD, files.__file__, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture(params=["folder", "file", "missing file"])
def place(request, tmp_path):
    place = tmp_path / "place"
    if request.param == "folder":
        place.mkdir()
    elif request.param == "file":
        place.write_text("mine")
    return place


def assert_refused(place):
    message = r"place is in use by another run\. Wait until .* choose another place"
    with pytest.raises(RuntimeError, match=message), lock(place):
        raise AssertionError("Two hold it.")


def test_second_writer_is_refused_in_the_same_process(place):
    with lock(place):
        assert_refused(place)
        assert_refused(str(place))
    with lock(place), lock(place.with_name("other")):
        assert_refused(place)


def test_second_writer_is_refused_by_another_name_too(place, monkeypatch):
    link = place.with_name("link_to_place")
    link.symlink_to(place)
    monkeypatch.chdir(place.parent)
    with lock(place):
        assert_refused(link)
        assert_refused("place")


def test_second_writer_is_refused_in_another_process(place):
    with another_process_holds(place):
        assert_refused(place)


def test_kill_leaves_no_lock(place):
    with another_process_holds(place) as process:
        process.kill()
        process.wait()
        with lock(place):
            assert_refused(place)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_leaves_no_lock(error, place):
    with pytest.raises(error), lock(place):
        raise error
    with lock(place):
        pass


def test_lock_changes_nothing_but_its_own_hidden_file(place):
    before = place.read_text() if place.is_file() else place.is_dir()
    with lock(place):
        pass
    assert (place.read_text() if place.is_file() else place.is_dir()) == before
    others = {path.name for path in place.parent.rglob("*")} - {"place"}
    assert others <= {".lock", ".place.lock"}


def test_lock_file_of_somebody_else_is_not_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    place = tmp_path / "place"
    place.mkdir()
    (place / ".lock").symlink_to(precious)
    with pytest.raises(OSError, match=r"\.lock"), lock(place):
        raise AssertionError("It was followed.")
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")])
def test_place_that_cannot_be_written_is_named(error, place, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise type(error)(error.errno, error.strerror, str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=r"(Permission denied|Read-only file system): '.*\.lock'"), lock(place):
        raise AssertionError("It cannot be held.")


def test_place_inside_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises((FileExistsError, NotADirectoryError), match="file"), lock(tmp_path / "file" / "place"):
        raise AssertionError("It cannot be held.")


# JSON


KIND = "supershaper-hf test 1"
CONTENT = {
    "name": "första \ud800 \x00 \u2028",
    "widths": [120, 240, 10**30],
    "losses": [0.1, -0.0, 5e-324, 1.7976931348623157e308, 1.0],
    "nested": {"9": None, "10": [True, False, {}], "": [[]]},
}


def test_json_comes_back_as_it_was(tmp_path):
    file = write_json(tmp_path / "test.json", KIND, CONTENT)
    read = read_json(file, KIND)
    assert read == CONTENT
    assert repr(read) == repr(CONTENT)  # 1 is not 1.0, 0.0 is not -0.0, and the order is kept
    assert json.loads(file.read_text())["format"] == KIND
    assert len(file.read_text().splitlines()) == 2 + 2 + len(CONTENT)


def test_json_with_numbers_as_keys_can_be_read(tmp_path):
    """As numbers 9 comes before 10, as strings it comes after it."""
    content = {"counts": {10: 1, 9: 2}, "pair": (1, 2)}
    assert read_json(write_json(tmp_path / "test.json", KIND, content), KIND) == {
        "counts": {"10": 1, "9": 2},
        "pair": [1, 2],
    }


def read_or_message(file):
    try:
        return read_json(file, KIND)
    except ValueError as error:
        return str(error)


def test_every_changed_byte_is_noticed(tmp_path):
    """Whatever is flipped, removed, added or cut off: the same content, or a ValueError that names the file."""
    file = write_json(tmp_path / "test.json", KIND, CONTENT)
    intact = file.read_bytes()
    damaged = [
        intact[:i] + bytes([intact[i] ^ (1 << bit)]) + intact[i + 1 :] for i in range(len(intact)) for bit in range(8)
    ]
    damaged += [intact[:i] + intact[i + 1 :] for i in range(len(intact))]
    damaged += [intact[:i] for i in range(len(intact))]
    damaged += [
        intact[:i] + byte + intact[i:] for i in range(len(intact)) for byte in (b"0", b" ", b'"', b"[", b"\xff")
    ]
    believed = 0
    for data in damaged:
        file.write_bytes(data)
        read = read_or_message(file)
        if isinstance(read, str):
            assert read.startswith(f"{file} ")
        else:
            believed += 1
            assert repr(dict(sorted(read.items()))) == repr(dict(sorted(CONTENT.items())))
    assert 0 < believed < len(intact)  # white space


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("\ufeff{}", "BOM"),
        ("{} {}", "Extra data"),
        ("NaN", "NaN is not a finite number"),
        ('{"a": [-Infinity]}', "-Infinity is not a finite number"),
        ("[1e999]", "1e999 is not a finite number"),
        ('{"a": 1, "a": 1}', "a key occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 5000, "limit"),
        (b'{"a": "\xff"}', "utf-8"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
        (b"", "Expecting value"),
    ],
)
def test_what_is_not_json_is_refused_by_name(text, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"(?s)^line 7 is not JSON: .*{reason}.*\. It is damaged, or holds"):
        parse_json(text, "line 7")
    file = tmp_path / "test.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"test\.json is not JSON"):
        read_json(file, KIND)


@pytest.mark.parametrize("depth", [*range(100, 1100, 50), 10_000, 100_000])
def test_deep_nesting_is_read_or_refused(depth, tmp_path):
    file = tmp_path / "test.json"
    for opening, closing in (("[", "]"), ('{"a": ', "}")):
        deep = opening * depth + "1" + closing * depth
        for text in (deep, f'{{"format": {deep}}}', f'{{"format": "{KIND}", "checksum": "0", "a": {deep}}}'):
            file.write_text(text)
            with pytest.raises(ValueError, match=r"test\.json"):
                read_json(file, KIND)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[]", "missing"),
        ("1", "missing"),
        ("{}", "missing"),
        ('{"format": 1}', "missing"),
        ('{"format": "other"}', "'other'"),
    ],
)
def test_another_kind_of_file_is_refused_by_name(text, shown, tmp_path):
    file = tmp_path / "test.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"test\.json is not a '{KIND}' file: its format is {shown}\."):
        read_json(file, KIND)


def test_another_version_is_refused_by_name(tmp_path):
    file = write_json(tmp_path / "test.json", "predictor 1", {})
    with pytest.raises(ValueError, match=r"is not a 'predictor 2' file: its format is 'predictor 1'\."):
        read_json(file, "predictor 2")


def test_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"test\.json"):
        read_json(tmp_path / "test.json", KIND)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_number_that_is_not_finite_is_not_written(number, tmp_path):
    with pytest.raises(ValueError, match=r"test\.json: 'losses' holds a number that is not finite"):
        write_json(tmp_path / "test.json", KIND, {"name": "a", "losses": [1.0, number]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["format", "checksum"])
def test_key_of_the_format_is_not_overwritten(key, tmp_path):
    with pytest.raises(ValueError, match=rf"the keys \['{key}'\] belong to the file format"):
        write_json(tmp_path / "test.json", KIND, {key: "mine"})


def test_checksum_is_that_of_the_content():
    assert checksum({"a": 1, "b": [1.5]}) == checksum({"b": (1.5,), "a": 1})
    assert len({checksum(value) for value in (1, 1.0, "1", [1], None, {"1": 1}, {"1": 1.0})}) == 7
    assert len(checksum(0)) == 16


def test_numbers_that_are_not_finite_become_null():
    value = {"a": [math.nan, 1.5, (math.inf,)], "b": {"c": -math.inf}, "d": "NaN", "e": 1}
    assert json.loads(to_json(value)) == {"a": [None, 1.5, [None]], "b": {"c": None}, "d": "NaN", "e": 1}
    assert to_json({"a": 1}, indent=2) == '{\n  "a": 1\n}'
