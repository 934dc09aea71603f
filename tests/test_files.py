import pytest

from supershaper_hf.files import check_output_folder, write_file, write_folder


def write_two_files(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")


def crash_after_one_file(folder):
    (folder / "config.json").write_text("{}")
    raise RuntimeError("disk full")


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


@pytest.mark.parametrize("occupied", ["file", "file/config.json"], ids=["file", "folder"])
def test_occupied_path_is_refused_before_anything_is_written(occupied, tmp_path):
    (tmp_path / occupied).parent.mkdir(exist_ok=True)
    (tmp_path / occupied).touch()
    with pytest.raises(FileExistsError, match=r"file exists and is not an empty folder\. Choose another one"):
        write_folder(tmp_path / "file", crash_after_one_file)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("name", ["missing", ""])
def test_missing_or_empty_folder_is_accepted(name, tmp_path):
    assert check_output_folder(str(tmp_path / name)) == tmp_path / name


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
