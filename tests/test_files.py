"""A crash at any moment loses neither the old nor the new file or folder."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest

from supershaper_hf import files
from supershaper_hf.files import (
    check_output_folder,
    force_to_disk,
    make_readable,
    recover_folder,
    write_file,
    write_folder,
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


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_write_folder_has_not_left_is_neither_removed_nor_put_back(kind, tmp_path):
    mine = tmp_path / ".best.old"
    writer({"notes.txt": "mine"})(tmp_path / "elsewhere")
    mine.write_text("mine") if kind == "file" else mine.symlink_to("elsewhere")
    recover_folder(tmp_path / "best")
    assert not (tmp_path / "best").exists()
    write_folder(tmp_path / "best", writer(OLD))
    assert mine.is_symlink() if kind == "link" else mine.read_text() == "mine"
    with pytest.raises(OSError, match=r"\.best\.old"):
        write_folder(tmp_path / "best", writer(NEW), replace=True)
    assert contents(tmp_path / "best") == OLD
    assert contents(tmp_path / "elsewhere") == {"notes.txt": "mine"}


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
        (partial / "broken").symlink_to("missing")

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


def test_full_disk_names_the_file(tmp_path, monkeypatch):
    """The error of the operating system does not name it, because it comes from a file that is open already."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = write_file(tmp_path / "front.csv", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{re.escape(str(file))}'"):
        write_file(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["front.csv"]
