"""JSON files come back as they were written, or are refused by name."""

import json
import math
from pathlib import Path

import pytest

from supershaper_hf.files import checksum, parse_json, read_json, to_json, write_json


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
    content = {"counts": {10: 1, 9: 2}, "pair": (1, 2), 7: "seven"}
    assert read_json(write_json(tmp_path / "test.json", KIND, content), KIND) == {
        "counts": {"10": 1, "9": 2},
        "pair": [1, 2],
        "7": "seven",
    }


def read_or_message(file):
    try:
        return read_json(file, KIND)
    except ValueError as error:
        return str(error)


def test_every_changed_byte_is_noticed(tmp_path, monkeypatch):
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
        monkeypatch.setattr(Path, "read_bytes", lambda _, data=data: data)
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
