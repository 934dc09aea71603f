import re
import sys

import numpy as np
import pytest
from conftest import tiny_config
from damages import damages, load_or_refuse

from supershaper_hf import SearchSpace
from supershaper_hf.files import read_json, write_json
from supershaper_hf.latency.insensitivity import (
    FORMAT,
    Insensitivity,
    compare_equal_sizes,
    insensitivity_rows,
    load_comparisons,
    save_comparisons,
    shapes_near,
    summarize,
    width_rows,
)
from supershaper_hf.latency.table import LatencyTable
from supershaper_hf.report.tables import markdown_table


MODULE = sys.modules[compare_equal_sizes.__module__]
SPACE = SearchSpace.from_config(tiny_config(num_hidden_layers=6))
BUDGET = (SPACE.num_parameters(SPACE.smallest) + SPACE.num_parameters(SPACE.largest)) // 2


class FakeTimer:
    """Stands for `SubnetTimer`: runs take what `seconds_of(shape, copy, sweep)` says."""

    seconds_of = staticmethod(lambda shape, copy, sweep: 1.0)
    built: list["FakeTimer"] = []

    def __init__(self, space, shapes, *arguments):
        self.shapes, self.arguments, self.samples, self.discarded = [tuple(shape) for shape in shapes], arguments, [], 0
        self.built.append(self)

    def sweep(self, keep=True):
        self.discarded += not keep
        if keep:
            sweep = len(self.samples)
            runs = [self.seconds_of(shape, index % 2, sweep) for index, shape in enumerate(self.shapes)]
            self.samples.append(runs)

    @property
    def seconds(self):
        return np.array(self.samples)


@pytest.fixture
def timed(monkeypatch):
    """Measure with made-up seconds."""
    monkeypatch.setattr(MODULE, "SubnetTimer", FakeTimer)
    monkeypatch.setattr(FakeTimer, "built", [])

    def measure(seconds_of, parameters=(BUDGET,), **arguments):
        monkeypatch.setattr(FakeTimer, "seconds_of", staticmethod(seconds_of))
        return compare_equal_sizes(SPACE, parameters, **arguments)

    return measure


# Spread and noise


def test_spread_and_noise_of_known_seconds():
    """Shapes at 1.0, 2.0 and 3.0, copies .1 to both sides: variance of one copy .02, of the mean of two .01."""
    medians = np.array([[2.1, 1.9], [2.9, 3.1], [1.1, 0.9]])
    record = summarize(100, np.array([[20], [36], [8]]), np.array([100, 102, 98]), medians)
    assert record.seconds == pytest.approx([1.0, 2.0, 3.0])
    assert record.shapes == [[8], [20], [36]]  # from the fastest to the slowest
    assert record.parameters == [98, 100, 102]
    assert record.spread == pytest.approx(1 / 2)
    assert record.noise == pytest.approx(0.1 / 2)
    assert record.excess == pytest.approx(np.sqrt(0.25 - 0.0025))
    assert record.parameter_spread == pytest.approx(0.02)
    assert record.verdict == "49.7% above noise"


@pytest.mark.parametrize("copies", [2, 3])
@pytest.mark.parametrize("truth", [0.0, 0.05])
def test_noise_is_the_spread_of_equal_shapes(copies, truth):
    """Over many trials: noise**2 is the expected spread**2 of equally fast shapes, excess**2 what the truth adds."""
    random = np.random.default_rng(0)
    shapes, records = np.arange(1, 11)[:, None], []
    for _ in range(2000):
        speeds = 1 + truth * random.standard_normal((10, 1))
        medians = speeds + 0.02 * random.standard_normal((10, copies))
        records.append(summarize(1, shapes, np.ones(10), medians))
    noise, spread = (np.mean([getattr(r, name) ** 2 for r in records]) for name in ("noise", "spread"))
    assert noise == pytest.approx(0.02**2 / copies, rel=0.03)
    assert spread == pytest.approx(0.02**2 / copies + truth**2, rel=0.05)
    alarms = np.mean([record.verdict != "no more than noise" for record in records])
    assert alarms > 0.9 if truth else alarms == pytest.approx(0.05, abs=0.015)


def test_equal_seconds_are_no_more_than_noise():
    record = summarize(1, np.array([[8], [20]]), np.array([1, 1]), np.ones((2, 2)))
    assert (record.spread, record.noise, record.excess, record.verdict) == (0, 0, 0, "no more than noise")


def test_difference_without_noise_is_above_noise():
    record = summarize(1, np.array([[8], [20]]), np.array([1, 1]), np.array([[1.0, 1.0], [3.0, 3.0]]))
    assert (record.noise, record.p_value) == (0, 0)
    assert record.verdict == "70.7% above noise"


def test_spread_below_the_noise_has_no_excess():
    record = summarize(1, np.array([[8], [20]]), np.array([1, 1]), np.array([[1.0, 3.0], [3.1, 1.0]]))
    assert record.excess == 0
    assert record.verdict == "no more than noise"


# Measuring


def test_seconds_are_medians_of_the_kept_sweeps(timed):
    """A copy takes its shape's first width, the second copy 2 more, and now and then a run is disturbed."""
    [record] = timed(lambda shape, copy, sweep: shape[0] + 2 * copy + 1000 * (sweep == 1), repeats=3, warmup=2)
    assert record.seconds == sorted(shape[0] + 1 for shape in record.shapes)
    assert record.noise == pytest.approx(1 / np.mean(record.seconds))  # copies differ by 2: variance 2, of the mean 1
    [timer] = FakeTimer.built
    assert timer.discarded == 2
    assert len(timer.samples) == 3


def test_slow_sweep_that_meets_all_is_no_difference(timed):
    [record] = timed(lambda shape, copy, sweep: 1 + sweep, repeats=4)
    assert record.spread == record.noise == 0


def test_every_budget_gets_its_record_and_its_own_sweeps(timed):
    budgets = [int(BUDGET * 0.8), BUDGET]
    records = timed(lambda shape, *_: sum(shape), budgets, num_shapes=4, tolerance=0.05, repeats=2, seed=3)
    assert [record.target for record in records] == budgets
    assert len(FakeTimer.built) == 2
    for record, timer in zip(records, FakeTimer.built):
        assert len(record.shapes) == 4
        assert sorted(timer.shapes) == sorted(2 * [tuple(shape) for shape in record.shapes])  # every shape twice
        assert timer.shapes[::2] == timer.shapes[1::2]
        assert record.seconds == [sum(shape) for shape in record.shapes]
        assert record.parameters == [SPACE.num_parameters(shape) for shape in record.shapes]
        assert timer.arguments[-1] == 3


def test_real_measurement_has_all_records():
    [record] = compare_equal_sizes(SPACE, [BUDGET], num_shapes=3, repeats=2, warmup=1, sequence_length=5)
    assert len(record.shapes) == len(record.seconds) == 3
    assert min(record.seconds) > 0
    assert 0 <= record.p_value <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_shapes": 1}, "num_shapes=1 must be an integer of at least 2."),
        ({"repeats": 0}, "repeats=0 must be an integer of at least 1."),
        ({"warmup": -1}, "warmup=-1 must be an integer of at least 0."),
        ({"tolerance": -0.1}, "tolerance=-0.1 must be a finite number at least 0 and below 1"),
        ({"tolerance": 1}, "tolerance=1 must be a finite number at least 0 and below 1"),
        ({"parameters": [10]}, "0 shapes have 10 parameters within 2.0%, but a comparison needs two."),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(timed, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        timed(lambda *_: 1.0, **arguments)
    assert not FakeTimer.built


# Shapes


def test_shapes_are_distinct_and_near_the_budget():
    shapes = shapes_near(SPACE, BUDGET, 12, tolerance=0.02, seed=0)
    assert shapes.shape == (12, 6)
    assert len(np.unique(shapes, axis=0)) == 12
    assert (np.abs(SPACE.num_parameters(shapes) / BUDGET - 1) <= 0.02).all()


def test_shapes_are_drawn_from_their_seed():
    first, same, other = (shapes_near(SPACE, BUDGET, 5, seed=seed) for seed in (1, 1, 2))
    assert first.tolist() == same.tolist() != other.tolist()


def test_more_rounds_find_what_the_first_does_not(monkeypatch):
    monkeypatch.setattr(MODULE, "DRAWS", 8)
    monkeypatch.setattr(MODULE, "ROUNDS", 200)
    assert len(shapes_near(SPACE, BUDGET, 10)) == 10


def test_too_few_shapes_warn_and_none_raise():
    tiny = SearchSpace.from_config(tiny_config(num_hidden_layers=2, width_choices=[20, 48]))
    middle = tiny.num_parameters([20, 48])  # [48, 20] is about as large, and there is no third
    with pytest.warns(UserWarning, match=rf"Only 2 of 5 shapes were found that have {middle:,} parameters within 5.0%"):
        assert len(shapes_near(tiny, middle, 5, tolerance=0.05)) == 2
    smallest = tiny.num_parameters(tiny.smallest)
    with pytest.raises(
        ValueError,
        match=rf"1 shapes have {smallest:,} parameters within 2.0%.*Subnets of this space have {smallest:,} to ",
    ):
        shapes_near(tiny, smallest, 5)


# Rows


def test_rows_are_text_for_a_table():
    record = Insensitivity(1_000_000, [[8, 20], [20, 8]], [0.010, 0.012], [1_010_000, 990_000], 0.01, 0.001)
    [row] = insensitivity_rows([record])
    assert row == {
        "parameters": "1,000,000",
        "their spread": "1.41%",
        "shapes": 2,
        "mean": "11.00 ms",
        "spread of shapes": "12.86%",
        "noise": "1.00%",
        "verdict": "12.8% above noise",
        "fastest": "10.00 ms [8, 20]",
        "slowest": "12.00 ms [20, 8]",
    }
    assert markdown_table([row]).splitlines()[2].startswith("| 1,000,000 | 1.41% | 2 | 11.00 ms | 12.86% | 1.00% |")


def test_width_rows_tell_the_time_per_parameter():
    config = tiny_config(hidden_size=128, width_choices=[20, 96, 104, 128])
    table = LatencyTable.measure(SearchSpace.from_config(config), sequence_length=5, repeats=1)
    rows = width_rows(table)
    assert [row["multiple of"] for row in rows] == ["neither 8 nor 64", "8", "8", "64"]
    assert [row["head size"] for row in rows] == [5, 24, 26, 32]
    assert rows[-1]["time per parameter"] == "1.00 x that of 128"
    assert all(re.fullmatch(r"\d+\.\d\d ms", row["block"]) for row in rows)
    markdown_table(rows)


# The file


MEASURED = [
    Insensitivity(1_000_000, [[8, 20], [20, 8]], [0.010, 0.012], [1_010_000, 990_000], 0.01, 0.001),
    Insensitivity(2_000_000, [[8, 48], [48, 8], [36, 36]], [0.1, 0.2, 0.3], [2_000_000, 2_010_000, 1_990_000], 0.0, 1),
]


@pytest.mark.parametrize("comparisons", [MEASURED, MEASURED[:1], []], ids=len)
def test_saved_comparisons_are_the_same(comparisons, tmp_path):
    save_comparisons(tmp_path / "insensitivity.json", comparisons)
    assert load_comparisons(tmp_path / "insensitivity.json") == comparisons


def test_damaged_file_is_refused_by_name_or_changes_nothing(tmp_path):
    file = tmp_path / "insensitivity.json"
    save_comparisons(file, MEASURED)
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        assert load_or_refuse(load_comparisons, file) in (MEASURED, None)


@pytest.mark.parametrize(
    "change",
    [
        {"target": 1.5},
        {"target": None},
        {"shapes": [8, 20]},
        {"shapes": [[8, 20], [20]]},
        {"shapes": [[8, 20]]},
        {"shapes": "8, 20"},
        {"seconds": [0.1]},
        {"seconds": 0.1},
        {"seconds": [-0.1, 0.2]},
        {"seconds": ["0.1", "0.2"]},
        {"seconds": [0.1, True]},
        {"parameters": [[1, 2]]},
        {"noise": -1},
        {"noise": "0"},
        {"p_value": 1.5},
        {"other": 1},
    ],
    ids=str,
)
def test_content_that_is_no_comparison_is_refused_by_name(change, tmp_path):
    """Somebody has written the file by hand, so the checksum is right."""
    file = tmp_path / "insensitivity.json"
    save_comparisons(file, MEASURED)
    first, second = read_json(file, FORMAT)["comparisons"]
    write_json(file, FORMAT, {"comparisons": [{**first, **change}, second]})
    with pytest.raises(ValueError, match=re.escape(f"{file} holds no comparison: ")):
        load_comparisons(file)


@pytest.mark.parametrize("content", [{}, {"comparisons": 5}, {"comparisons": [[]]}], ids=str)
def test_file_without_comparisons_is_refused_by_name(content, tmp_path):
    file = tmp_path / "insensitivity.json"
    write_json(file, FORMAT, content)
    with pytest.raises(ValueError, match=re.escape(f"{file} holds no comparison: ")):
        load_comparisons(file)


def test_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_comparisons(tmp_path / "none.json")
