import bz2
import gzip
import json
import lzma
import os
import random
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from datasets import Dataset, IterableDataset, load_dataset
from texts import random_documents, small_files_only
from torch.utils.data import DataLoader

from supershaper_hf.data.documents import (
    COMPRESSIONS,
    explained_disk_errors,
    load_text,
    split_text,
)


# Reading


def write(path, lines, kind="txt"):
    """Write documents as text, JSON lines or Parquet, compressed by the last suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        Dataset.from_dict({"number": range(len(lines)), "text": lines}).to_parquet(path)
        return path
    rows = lines if ".txt" in path.name else [json.dumps({"number": i, "text": line}) for i, line in enumerate(lines)]
    return write_bytes(path, "".join(f"{row}\n" for row in rows).encode())


def write_bytes(path, content):
    """Write a file, compressed by its suffix."""
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
    path.write_bytes(compress.get(path.suffix, bytes)(content))
    return path


def read(sources, streaming, **options):
    """The documents of `load_text`, and nothing else."""
    dataset = load_text(sources, streaming=streaming, **options)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    rows = list(dataset)
    assert all(row.keys() == {"text"} for row in rows)
    return [row["text"] for row in rows]


@pytest.fixture(params=[False, True], ids=["stored", "streaming"])
def streaming(request):
    return request.param


DOCUMENTS = ["One document.", "Ein drittes, größeres", "and another"]
SUFFIXES = [".txt", ".jsonl", ".json", ".parquet", *(f"{kind}{c}" for kind in (".txt", ".jsonl") for c in COMPRESSIONS)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_documents(suffix, streaming, tmp_path):
    assert read(write(tmp_path / f"text{suffix}", DOCUMENTS), streaming) == DOCUMENTS


def test_every_line_with_text_is_a_document(tmp_path, streaming):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("One document.\n\n   \n  And another.  \n", encoding="utf-8")
    second.write_text("Ein drittes, größeres", encoding="utf-8")
    assert read([first, str(second)], streaming) == ["One document.", "And another.", "Ein drittes, größeres"]


def test_missing_values_and_blank_rows_are_no_documents(tmp_path, streaming):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": " one "}\n{"other": 1}\n{"text": null}\n{"text": "  "}\n{"text": "two"}\n')
    assert read(file, streaming) == ["one", "two"]


def test_only_line_breaks_end_a_document(tmp_path):
    document = "One\u2028document\x0cof\x85four\x1dlines."
    (tmp_path / "text.txt").write_bytes(f"{document}\r\nAnother.".encode())
    assert load_text(tmp_path / "text.txt")["text"] == [document, "Another."]


@pytest.mark.parametrize("as_given", [str, lambda path: path, lambda path: [path]], ids=["str", "Path", "list"])
def test_one_file_may_be_given_bare(as_given, tmp_path):
    (tmp_path / "text.txt").write_text("One document.\n", encoding="utf-8")
    assert load_text(as_given(tmp_path / "text.txt"))["text"] == ["One document."]


def test_sources_are_read_in_order_and_folders_by_path(tmp_path, streaming):
    write(tmp_path / "folder/b.jsonl.gz", ["b"])
    write(tmp_path / "folder/a/z.parquet", ["a"])
    write(tmp_path / "folder/c.txt", ["c"])
    (tmp_path / "folder/README.md").write_text("no document")
    write(tmp_path / "x2.txt", ["x2"])
    write(tmp_path / "x1.txt", ["x1"])
    plain = write(tmp_path / "plain", ["plain"])
    sources = [plain, tmp_path / "folder", str(tmp_path / "x*.txt")]
    assert [path.name for path in tmp_path.glob("plain")] == ["plain"]
    write(plain, ["ignored"])
    plain.write_text("plain\n")
    assert read(sources, streaming) == ["plain", "a", "b", "c", "x1", "x2"]


def test_special_characters_of_globs_in_names_are_read_as_they_are(tmp_path, streaming):
    assert read(write(tmp_path / ".hidden/d[1]/a[2]*.txt", DOCUMENTS), streaming) == DOCUMENTS


def test_a_changed_file_is_read_again_an_unchanged_one_is_not(tmp_path):
    file = write(tmp_path / "text.txt", ["old"])
    first = load_text(file)
    assert load_text(file).cache_files == first.cache_files
    write(file, ["new"])
    assert load_text(file)["text"] == ["new"]


def test_files_of_equal_size_and_time_give_their_own_text(tmp_path, streaming):
    for words in ("old", "new"):
        file = write(tmp_path / "text.txt", [words])
        os.utime(file, ns=(10**18, 10**18))
        assert read(file, streaming) == [words]


def test_a_touched_file_is_not_read_again(tmp_path):
    file = write(tmp_path / "text.txt", ["same"])
    first = load_text(file)
    os.utime(file, ns=(10**18, 10**18))
    assert load_text(file).cache_files == first.cache_files


def test_text_is_read_again_by_another_version_of_the_reader(tmp_path, monkeypatch):
    file = write(tmp_path / "text.txt", ["same"])
    first = load_text(file)
    monkeypatch.setattr("supershaper_hf.data.documents.READER", 1000)
    assert load_text(file).cache_files != first.cache_files


@pytest.mark.parametrize("compression", ["", *COMPRESSIONS])
@pytest.mark.parametrize("content", ["one\ntwo\n", '{"text": "one"}\n{"text": "two"}\n'], ids=["txt", "jsonl"])
def test_a_byte_order_mark_is_no_text(compression, content, tmp_path, streaming):
    suffix = "jsonl" if "{" in content else "txt"
    mark = b"\xef\xbb\xbf"
    file = write_bytes(tmp_path / f"text.{suffix}{compression}", mark + content.encode())
    assert read(file, streaming) == ["one", "two"]
    alone = write_bytes(tmp_path / f"alone.{suffix}{compression}", mark)
    with pytest.raises(ValueError, match=re.escape(f"{alone} is empty: it holds no document with text.")):
        read(alone, streaming)


def test_the_column_of_text_can_be_chosen(tmp_path, streaming):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "no", "body": "yes"}\n')
    assert read(file, streaming, column="body") == ["yes"]
    assert read([file, write(tmp_path / "a.txt", ["plain"])], streaming, column="body") == ["yes", "plain"]


def test_workers_of_a_loader_share_the_files_of_a_stream(tmp_path):
    files = [write(tmp_path / f"{name}.txt", [name]) for name in "abc"]
    loader = DataLoader(load_text(files, streaming=True), batch_size=None, num_workers=2)
    assert sorted(row["text"] for row in loader) == ["a", "b", "c"]


# Faults


def test_no_files_are_refused():
    with pytest.raises(ValueError, match=r"No text files given\. Name at least one"):
        load_text([])


@pytest.mark.parametrize("name", ["missing.txt", "*.txt", "folder/missing.jsonl.gz"])
def test_missing_file_is_refused_by_name(name, tmp_path, streaming):
    with pytest.raises(FileNotFoundError, match=re.escape(f"Text file {tmp_path / name} does not exist")):
        load_text(str(tmp_path / name), streaming=streaming)


def test_relative_path_of_a_missing_file_is_no_hub_name():
    with pytest.raises(FileNotFoundError, match=r"Text file corpus/missing.txt does not exist"):
        load_text("corpus/missing.txt")


def test_folder_without_text_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("no document")
    with pytest.raises(FileNotFoundError, match=rf"Folder {tmp_path} holds no file that ends in \.txt, \.jsonl"):
        load_text(tmp_path)


@pytest.mark.parametrize("content", ["", "\n \n\t\n"], ids=["empty", "blank"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.parquet"])
def test_file_without_text_is_refused_by_name(name, content, tmp_path, streaming):
    full, empty = write(tmp_path / "full.txt", ["One document."]), tmp_path / name
    if name.endswith("parquet") and content:
        write(empty, [" ", ""])
    else:
        empty.write_text(content)
    with pytest.raises(ValueError, match=re.escape(f"{empty} is empty")):
        read([full, empty], streaming)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressed_file_of_nothing_is_refused_as_empty(suffix, compression, tmp_path, streaming):
    file = write_bytes(tmp_path / f"text{suffix}{compression}", b"")
    with pytest.raises(ValueError, match=re.escape(f"{file} is empty: it holds no document with text.")):
        read(file, streaming)


@pytest.mark.parametrize("columns", [{}, {"text": pyarrow.array([], pyarrow.string())}], ids=["columns", "rows"])
def test_parquet_without_rows_is_refused_as_empty(columns, tmp_path, streaming):
    file = tmp_path / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    with pytest.raises(ValueError, match=re.escape(f"{file} is empty: it holds no document with text.")):
        read(file, streaming)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl"])
def test_wrong_encoding_names_the_byte_and_its_position(suffix, tmp_path, streaming):
    file = tmp_path / f"latin{suffix}"
    start = b'{"text": "' if "json" in suffix else b""
    content = start + b"x" * 20_000 + b"\\n" * ("json" in suffix) + b"\n" * (not start) + "Tschüss".encode("latin1")
    content += b'"}\n' if start else b""
    file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    position = content.index(b"\xfc")
    with pytest.raises(ValueError, match=re.escape(f"{file} is not UTF-8: byte 0xfc at position {position}. Convert")):
        read(file, streaming)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_cut_file_is_refused_by_name(compression, tmp_path, streaming):
    file = write(tmp_path / f"text.txt{compression}", [str(random.Random(i).random()) for i in range(2000)])
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} (is damaged|cannot be read: it ends in the middle)"):
        read(file, streaming)


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_file_that_is_not_compressed_is_refused_by_name(compression, tmp_path, streaming):
    file = tmp_path / f"text.txt{compression}"
    file.write_text("One document.\n" * 100)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is damaged, or not what its suffix says: "):
        read(file, streaming)


def test_files_of_several_compressed_parts_are_read_to_the_end(tmp_path, streaming):
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00data"  # as pzstd writes
    for compress, suffix, between in ((zstandard.compress, ".zst", skippable), (gzip.compress, ".gz", b"")):
        file = tmp_path / f"text.txt{suffix}"
        file.write_bytes(compress(b"first\n") + between + compress(b"second\n"))
        assert read(file, streaming) == ["first", "second"]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_wrong_encoding_is_found_in_compressed_files(compression, tmp_path, streaming):
    file = write(tmp_path / f"text.txt{compression}", [])
    compress = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}
    file.write_bytes(compress[compression](b"one\ntwo \xfc"))
    with pytest.raises(ValueError, match=r"is not UTF-8: byte 0xfc at position 8\. .* \(decompressed first\)"):
        read(file, streaming)


def test_broken_line_of_json_is_named_by_its_number(tmp_path, streaming):
    file = write(tmp_path / "text.jsonl", ["one"] * 7)
    with file.open("a") as stream:
        stream.write('{"text": "half\n{"text": "whole"}\n')
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} is not JSON lines: line 8 is broken \(Invalid"):
        read(file, streaming)


def test_columns_that_come_late_are_refused_by_name(tmp_path, streaming):
    file = write(tmp_path / "text.jsonl", ["x" * 1_000_000] * 12)
    with file.open("a") as stream:
        stream.write('{"number": 1, "text": "short", "late": 1}\n')
    with pytest.raises(ValueError, match=rf"Some rows of {re.escape(str(file))} have other columns .*'late'"):
        read(file, streaming)


def test_broken_parquet_is_refused_by_name(tmp_path, streaming):
    file = write(tmp_path / "text.parquet", ["one"] * 7)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))} cannot be read: Parquet magic bytes not found"):
        read(file, streaming)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_column_is_refused_with_those_there_are(suffix, tmp_path, streaming):
    file = write(tmp_path / f"text{suffix}", DOCUMENTS)
    message = re.escape(f"{file} has no column 'body'. Its columns are ['number', 'text']")
    with pytest.raises(ValueError, match=message):
        read(file, streaming, column="body")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_column_of_numbers_is_refused(suffix, tmp_path, streaming):
    file = write(tmp_path / f"text{suffix}", DOCUMENTS)
    with pytest.raises(ValueError, match=re.escape(f"Column 'number' of {file} holds int, not text: 0.")):
        read(file, streaming, column="number")


def test_file_removed_while_streaming_is_named(tmp_path):
    files = [write(tmp_path / f"{name}.txt", [name]) for name in "ab"]
    rows = iter(load_text(files, streaming=True))
    assert next(rows) == {"text": "a"}
    files[1].unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"Text file {files[1]} does not exist any more.")):
        list(rows)


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    file = write(tmp_path / "text.txt", random_documents(100)["text"])
    message = re.escape(f"The text cannot be stored in {datasets.config.HF_DATASETS_CACHE}, because the disk or")
    with small_files_only(), pytest.raises(OSError, match=message):
        load_text(file)
    assert len(load_text(file)) == 100


def test_other_errors_are_not_taken_for_a_full_disk():
    for error in (OSError(13, "Permission denied"), ValueError("x"), datasets.exceptions.DatasetGenerationError("x")):
        with pytest.raises(type(error)) as caught, explained_disk_errors("folder"):
            raise error
        assert caught.value is error


# Data sets of the Hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The data set user/corpus, as a folder: what the Hub would serve, without it."""
    write(tmp_path / "user/corpus/data/train-00000-of-00001.parquet", ["", *DOCUMENTS])
    write(tmp_path / "user/corpus/data/test-00000-of-00001.parquet", ["test"])

    def load(path, *args, **kwargs):
        return load_dataset(str(tmp_path / path) if path == "user/corpus" else path, *args, **kwargs)

    monkeypatch.setattr("supershaper_hf.data.documents.load_dataset", load)


def test_hub_name_is_read_by_split(hub, streaming):
    assert read("user/corpus", streaming) == DOCUMENTS
    assert read("user/corpus:default", streaming, split="test") == ["test"]


def test_hub_and_files_can_be_mixed(hub, tmp_path, streaming):
    file = write(tmp_path / "a.txt", ["a"])
    assert read([file, "user/corpus", file], streaming) == ["a", *DOCUMENTS, "a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"split": "dev"},
            r"Data set user/corpus cannot be loaded with split='dev': .*train.*user/corpus:CONFIGURATION",
        ),
        ({"column": "body"}, r"user/corpus has no column 'body'. Its columns are \['number', 'text'\]"),
    ],
)
def test_wrong_split_or_column_of_the_hub_is_refused(hub, streaming, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_text("user/corpus", streaming=streaming, **options)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError("Not enough disk space. Needed: 3 GB")]
)
def test_a_full_disk_is_not_taken_for_an_unknown_data_set(hub, error, tmp_path, monkeypatch):
    write(tmp_path / "user/corpus/data/train-00000-of-00001.parquet", random_documents(300)["text"])
    with small_files_only(), pytest.raises(OSError, match=r"The text cannot be stored in .*, because the disk or"):
        load_text("user/corpus")
    assert len(load_text("user/corpus")) == 300

    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr("supershaper_hf.data.documents.load_dataset", full)
    with pytest.raises(OSError, match=r"The text cannot be stored in .*, because the disk or"):
        load_text("user/corpus")


@pytest.mark.parametrize("name", ["user/unknown", "unknown", "user/unknown:en"])
def test_unknown_name_is_refused(name, streaming):
    message = f"Nothing on disk matches '{name}', and no data set of the Hub could be loaded by this name: "
    with pytest.raises(FileNotFoundError, match=message):
        load_text(name, streaming=streaming)


# Splitting


def test_split_is_a_partition():
    documents = Dataset.from_dict({"text": [str(i) for i in range(50)]})
    train, held_out = split_text(documents, held_out=0.2, seed=0)
    assert len(held_out) == 10
    assert sorted([*train["text"], *held_out["text"]]) == sorted(documents["text"])


def test_split_depends_on_the_seed_alone():
    documents = Dataset.from_dict({"text": [str(i) for i in range(50)]})
    splits = [split_text(documents, held_out=0.2, seed=seed)[1]["text"] for seed in (3, 3, 4)]
    assert splits[0] == splits[1]
    assert splits[0] != splits[2]


def test_at_least_one_document_is_held_out():
    train, held_out = split_text(random_documents(3), held_out=0.01, seed=0)
    assert (len(train), len(held_out)) == (2, 1)


def test_at_least_one_document_is_left_to_train_on():
    train, held_out = split_text(random_documents(3), held_out=0.99, seed=0)
    assert (len(train), len(held_out)) == (1, 2)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=f"held_out={share} must be a finite number at least 0 and at most 1"):
        split_text(random_documents(3), held_out=share, seed=0)


def test_one_document_cannot_be_split():
    with pytest.raises(ValueError, match=r"The text has 1 document\(s\), but at least 2 are needed"):
        split_text(random_documents(1), held_out=0.5, seed=0)
