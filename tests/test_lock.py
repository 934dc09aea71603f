"""A second writer is refused, and no crash leaves a lock behind."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from supershaper_hf import files
from supershaper_hf.files import lock


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
