import itertools
import re
import tracemalloc
import types

import numpy as np
import pytest
import torch
from conftest import tiny_config
from damages import damages, load_or_refuse

from supershaper_hf import SearchSpace, devices
from supershaper_hf.files import read_json, write_json
from supershaper_hf.latency import table as latency
from supershaper_hf.latency import timing
from supershaper_hf.latency.table import Entries, LatencyProbe, LatencyTable, walk_through_pairs
from supershaper_hf.latency.timing import SubnetTimer
from supershaper_hf.model import elastic
from supershaper_hf.model.costs import chain_cost


CHOICES = [8, 20, 36, 48]
SPACE = SearchSpace.from_config(tiny_config())
SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80, "vocab_size": 61, "hidden_act": "gelu"}


def entries(seed=0, widths=4):
    random = np.random.default_rng(seed)
    return Entries(0.5, random.uniform(1, 2, (widths, widths)), random.uniform(0.1, 0.2, widths), 0.25)


def made_table(**changes):
    """A table of made-up seconds that claims to be measured on this machine."""
    attributes = {
        "width_choices": CHOICES,
        "seconds": entries(0),
        "spread": entries(1),
        "device": latency.device_name("cpu"),
        "dtype": "float32",
        "batch_size": 2,
        "sequence_length": 9,
        "repeats": 3,
        "attention": "sdpa",
        "torch_version": "2.11",
        "sizes": SIZES,
    }
    return LatencyTable(**{**attributes, **changes})


def content(table):
    """Everything a table holds, comparable."""
    arrays = [entry.numbers().tolist() for entry in (table.seconds, table.spread)]
    return {**vars(table), "seconds": arrays[0], "spread": arrays[1]}


class Ticks:
    """A clock that shows sums of given intervals, in the order it is asked."""

    def __init__(self, monkeypatch, intervals):
        self.times = np.concatenate([[0.0], np.cumsum(intervals)]).tolist()
        monkeypatch.setattr(devices, "time", types.SimpleNamespace(perf_counter=lambda: self.times.pop(0)))


# The walk


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choices", [[48], [8, 48], CHOICES, [120, 240, 360, 480, 540, 600, 768]], ids=len)
def test_walk_takes_every_step_once_and_comes_back(choices, seed):
    walk = walk_through_pairs(choices, seed)
    assert walk[0] == walk[-1] == choices[-1]
    assert sorted(itertools.pairwise(walk)) == sorted(itertools.product(choices, repeat=2))


def test_walk_is_drawn_from_its_seed():
    assert walk_through_pairs(CHOICES, 1) == walk_through_pairs(CHOICES, 1) != walk_through_pairs(CHOICES, 2)


# The probe


def probe_ticks(probe, embeddings, block, leave, head):
    """The intervals of one sweep in which every entry takes a known time; copies between bottlenecks take 99 s."""
    blocks = [block(source, width) for source, width in itertools.pairwise(probe.walk)]
    others = itertools.chain.from_iterable((99.0, leave(width)) for width in CHOICES[:-1])
    return [embeddings, *blocks, leave(CHOICES[-1]), head, *others]


@pytest.mark.parametrize("seed", [0, 1])
def test_entries_are_what_the_stamps_say(monkeypatch, seed):
    probe = LatencyProbe(SPACE, sequence_length=5, seed=seed)
    ticks = probe_ticks(probe, 7.0, lambda source, width: source + width / 64, lambda width: width / 8, 3.0)
    clock = Ticks(monkeypatch, ticks)
    probe.sweep()
    assert not clock.times  # one stamp for each, no more
    seconds = probe.table().seconds
    assert (seconds.embeddings, seconds.head) == (7.0, 3.0)
    assert seconds.blocks.tolist() == [[source + width / 64 for width in CHOICES] for source in CHOICES]
    assert seconds.leave.tolist() == [1.0, 2.5, 4.5, 6.0]


def test_table_holds_medians_and_interquartile_ranges(monkeypatch):
    probe = LatencyProbe(SPACE, sequence_length=5)
    sweeps = [probe_ticks(probe, t, lambda *_, t=t: 2 * t, lambda _, t=t: 4 * t, 8 * t) for t in (1, 2, 3, 10, 20)]
    Ticks(monkeypatch, np.concatenate([[*sweep, 0.0] for sweep in sweeps]))
    for _ in sweeps:
        probe.sweep()
    table = probe.table()
    assert table.repeats == 5
    assert set(table.seconds.numbers()) == {3.0, 6.0, 12.0, 24.0}
    np.testing.assert_allclose(table.spread.numbers(), (10 - 2) / 3, atol=1e-4)


def test_prediction_of_the_walk_is_what_the_walk_took(monkeypatch):
    probe = LatencyProbe(SPACE, sequence_length=5)
    ticks = np.random.default_rng(0).uniform(1, 2, 18 + 1 + 6)
    Ticks(monkeypatch, ticks)
    probe.sweep()
    assert probe.table().predict([probe.walk[1:]])[0] == pytest.approx(ticks[:19].sum())


def test_stamps_are_taken_where_the_parts_begin():
    """What ran between two neighbouring stamps is one part: bottleneck and layer of one step of the walk."""
    probe = LatencyProbe(SPACE, sequence_length=5)
    events = []

    class Clock:
        def synchronize(self):
            events.append("synchronize")

        def stamp(self):
            events.append("stamp")
            return 0.0

        def intervals(self, stamps):
            return np.diff(stamps)

    for name, module in probe._model.named_modules():
        if (
            name.endswith(("bert.embeddings", "predictions"))
            or "bottleneck." in name
            or name.split(".")[-2:-1] == ["layer"]
        ):
            module.register_forward_hook(lambda *_, name=name: events.append(name))
    type(probe._workload).clock, original = property(lambda _: Clock()), type(probe._workload).clock
    try:
        probe.sweep()
    finally:
        type(probe._workload).clock = original
    encoder = "bert.encoder."
    expected = ["synchronize", "stamp", "bert.embeddings"]
    for step in range(16):
        expected += ["stamp", f"{encoder}input_bottleneck.{step}", f"{encoder}layer.{step}"]
    expected += ["stamp", f"{encoder}output_bottleneck.0", "stamp", "cls.predictions", "stamp"]
    assert events == expected + ["stamp"] * 6


def test_probe_is_one_subnet_of_ordinary_numbers_in_evaluation_mode():
    probe = LatencyProbe(SPACE, sequence_length=5, dtype=torch.bfloat16, batch_size=2)
    model = probe._model
    assert model.config.hidden_sizes == probe.walk[1:]
    assert model.config.merged_bottlenecks
    assert not any(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {tuple(tensor.shape) for tensor in probe._batch.values()} == {(2, 5)}
    assert probe._batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    assert (probe._batch["attention_mask"] == 1).all()
    for parameter in itertools.chain(model.parameters(), *(bottleneck.parameters() for bottleneck, _ in probe._others)):
        size = parameter.detach().float().abs()
        assert (size > torch.finfo(torch.float32).tiny).all()
        assert size.max() < 2
    for norm in (module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)):
        assert norm.weight.detach().float().mean() == pytest.approx(1, abs=0.05)  # states of ordinary size
    assert model.cls["predictions"].decoder.weight is model.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        assert model(**probe._batch).logits.shape == (2, 5, 61)


def test_sweep_leaves_nothing_behind():
    probe = LatencyProbe(SPACE, sequence_length=5)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    probe.sweep()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in probe._model.modules())


def test_no_linear_map_has_a_hook_while_it_is_timed(monkeypatch):
    """With one it would take all tokens at once, which is slower, and no subnet would be as slow."""
    monkeypatch.setattr(elastic, "TOKENS_AT_A_TIME", 3)
    asked, is_hooked = [], elastic.is_hooked
    monkeypatch.setattr(
        elastic, "is_hooked", lambda module: asked.append((module, is_hooked(module))) or is_hooked(module)
    )
    probe = LatencyProbe(SPACE, sequence_length=8)
    probe.sweep()
    encoder = probe._model.base_model.encoder
    maps = [*encoder.input_bottleneck, *encoder.output_bottleneck, *(bottleneck for bottleneck, _ in probe._others)]
    assert set(maps) <= {module for module, _ in asked}
    assert not any(hooked for _, hooked in asked)


def test_failed_sweep_leaves_no_hooks_and_no_sample():
    probe = LatencyProbe(SPACE, sequence_length=5)
    probe._batch["input_ids"] = torch.full((1, 5), 61)  # not in the vocabulary
    with pytest.raises(IndexError):
        probe.sweep()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in probe._model.modules())
    with pytest.raises(ValueError, match="no samples yet"):
        probe.table()


def test_other_bottlenecks_read_ordinary_states_that_were_just_written():
    probe, read = LatencyProbe(SPACE, sequence_length=5), []
    for bottleneck, _ in probe._others:
        bottleneck.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    probe.sweep()
    assert [tuple(states.shape) for states in read] == [(1, 5, width) for width in CHOICES[:-1]]
    for (bottleneck, states), inputs in zip(probe._others, read):
        assert bottleneck.out_features == 48
        assert torch.equal(inputs, states)
        assert inputs.data_ptr() != states.data_ptr()
        assert 0.5 < states.std() < 2


def test_runs_are_made_in_inference_mode():
    probe, modes = LatencyProbe(SPACE, sequence_length=5), []
    timer = SubnetTimer(SPACE, [[8, 8, 8]], sequence_length=5)
    for model in (probe._model, timer._models[0]):
        model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    probe.sweep()
    timer.sweep()
    assert modes == [True, True]


def test_building_leaves_the_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    LatencyProbe(SPACE, sequence_length=5)
    SubnetTimer(SPACE, [[8, 20, 0]], sequence_length=5)
    assert torch.equal(before, torch.get_rng_state())


def test_probe_is_drawn_from_its_seed():
    first, same, other = (LatencyProbe(SPACE, sequence_length=5, seed=seed) for seed in (1, 1, 2))
    assert first.walk == same.walk != other.walk
    for name, tensor in first._model.state_dict().items():
        assert torch.equal(tensor, same._model.state_dict()[name])
    assert torch.equal(first._batch["input_ids"], same._batch["input_ids"])
    assert not torch.equal(first._batch["input_ids"], other._batch["input_ids"])


def test_real_measurement_is_positive_and_says_what_it_measured():
    table = LatencyTable.measure(SPACE, batch_size=2, sequence_length=9, repeats=2, warmup=1)
    assert table.width_choices == CHOICES
    assert (table.seconds.numbers() > 0).all()
    assert (table.batch_size, table.sequence_length, table.repeats, table.dtype) == (2, 9, 2, "float32")
    assert (table.sizes, table.attention, table.torch_version) == (SIZES, "sdpa", torch.__version__)
    assert table.device == latency.device_name("cpu")
    assert table.device.endswith(", 1 threads")
    predicted = table.predict(SearchSpace.from_config(tiny_config()).sample(5, 0))
    assert predicted.shape == (5,)
    assert (np.isfinite(predicted) & (predicted > 0)).all()


def test_warmup_is_thrown_away(monkeypatch):
    kept = []
    monkeypatch.setattr(LatencyProbe, "sweep", lambda self, keep=True: kept.append(keep))
    monkeypatch.setattr(LatencyProbe, "table", lambda self: "table")
    assert LatencyTable.measure(SPACE, sequence_length=5, repeats=2, warmup=3) == "table"
    assert kept == [False, False, False, True, True]


def test_sweep_not_kept_is_no_sample():
    probe = LatencyProbe(SPACE, sequence_length=5)
    timer = SubnetTimer(SPACE, [[8, 8, 8]], sequence_length=5)
    probe.sweep(keep=False)
    timer.sweep(keep=False)
    assert timer.seconds.shape == (0, 1)
    with pytest.raises(ValueError, match=re.escape("Call sweep() at least once, better 20 times.")):
        probe.table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1."),
        ({"batch_size": True}, "batch_size=True must be an integer of at least 1."),
        ({"sequence_length": -1}, "sequence_length=-1 must be an integer of at least 1."),
        ({"sequence_length": 1.5}, "sequence_length=1.5 must be an integer of at least 1."),
        ({"sequence_length": 25}, "sequence_length=25 is above max_position_embeddings=24. Use at most 24."),
        ({"repeats": 0}, "repeats=0 must be an integer of at least 1."),
        ({"warmup": -1}, "warmup=-1 must be an integer of at least 0."),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not a floating-point type. Use torch.float32"),
        ({"dtype": "float32"}, "dtype='float32' is not a floating-point type. Use torch.float32"),
        ({"device": "meta"}, "device='meta' is not available on this machine. Allowed: ['cpu'"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LatencyTable.measure(SPACE, **{"sequence_length": 5, **arguments})


def test_a_configuration_is_as_good_as_its_search_space(monkeypatch):
    spaces = []
    monkeypatch.setattr(
        latency, "LatencyProbe", lambda space, *_: spaces.append(space) or LatencyProbe(SPACE, "cpu", 1, 5)
    )
    for given in (tiny_config(), SPACE):
        LatencyTable.measure(given, repeats=1, warmup=0)
    assert [space.width_choices for space in spaces] == [CHOICES] * 2
    assert all(isinstance(space, SearchSpace) for space in spaces)


def test_subnet_configuration_is_refused():
    with pytest.raises(ValueError, match=re.escape("hidden_sizes=[8, 20].") + ".*the supernet's configuration"):
        LatencyTable.measure(tiny_config().subnet_config([8, 0, 20]), sequence_length=5)


class FakeGPU:
    """Stands for `torch.mps`: events that tell the time, in milliseconds, only after they were synchronised."""

    def __init__(self):
        self.now, self.synchronized = 0.0, -1.0
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                assert enable_timing

            def record(self):
                gpu.now += 1.0
                self.time = gpu.now

            def elapsed_time(self, end):
                assert gpu.synchronized >= end.time
                return end.time**2 - self.time**2

        self.Event = Event

    def synchronize(self):
        self.synchronized = self.now


def test_device_stamps_are_read_after_the_device_reached_them(monkeypatch):
    monkeypatch.setattr(torch, "mps", FakeGPU())
    clock = timing.Clock(torch.device("mps"))
    clock.synchronize()
    stamps = [clock.stamp() for _ in range(3)]
    np.testing.assert_allclose(clock.intervals(stamps), [0.003, 0.005])


def test_device_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device='cuda:1' is not available on this machine\. Allowed: \['cpu'"):
        LatencyTable.measure(SPACE, device="cuda:1", sequence_length=5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measurement_on_a_gpu_is_positive():
    table = LatencyTable.measure(SPACE, device="cuda", sequence_length=9, repeats=2, dtype=torch.bfloat16)
    assert (table.seconds.numbers() > 0).all()
    assert table.device == torch.cuda.get_device_name()


# Whole subnets


def test_timer_runs_every_subnet_once_a_sweep_in_changing_order(monkeypatch):
    timer = SubnetTimer(SPACE, [[8, 8, 8], [0, 20, 48], [36, 36, 36]], sequence_length=5)
    runs = []
    for index, model in enumerate(timer._models):
        model.register_forward_hook(lambda *_, index=index: runs.append(index))
        assert not model.training
    assert [model.config.hidden_sizes for model in timer._models] == [[8, 8, 8], [20, 48], [36, 36, 36]]
    for _ in range(6):
        timer.sweep()
    sweeps = np.reshape(runs, (6, 3))
    assert (np.sort(sweeps) == [0, 1, 2]).all()
    assert len(np.unique(sweeps, axis=0)) > 1
    assert timer.seconds.shape == (6, 3)
    assert (timer.seconds > 0).all()


def test_timer_gives_each_subnet_its_own_seconds(monkeypatch):
    """The clock goes on by the width of the subnet that ran, however the sweep is ordered."""
    now = [0.0]
    monkeypatch.setattr(devices, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    timer = SubnetTimer(SPACE, [[8, 8, 8], [20, 20, 20], [36, 36, 36]], sequence_length=5)
    for model in timer._models:
        width = model.config.hidden_sizes[0]
        model.register_forward_hook(lambda *_, width=width: now.__setitem__(0, now[0] + width))
    for _ in range(4):
        timer.sweep()
    assert timer.seconds.tolist() == [[8.0, 20.0, 36.0]] * 4


def test_copies_of_a_subnet_share_no_memory():
    timer = SubnetTimer(SPACE, [[8, 8, 8], [8, 8, 8]], sequence_length=5)
    first, second = ({parameter.data_ptr() for parameter in model.parameters()} for model in timer._models)
    assert not first & second
    for tensors in zip(*(model.state_dict().values() for model in timer._models)):
        assert not torch.equal(*tensors)


# Predicting


def by_hand(table, shape):
    """Add the entries of one shape up, one part after the other."""
    index = {width: position for position, width in enumerate(CHOICES)}
    source, seconds = CHOICES[-1], table.seconds.embeddings + table.seconds.head
    for width in shape:
        if width:
            seconds += table.seconds.blocks[index[source], index[width]]
            source = width
    return seconds + table.seconds.leave[index[source]]


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_prediction_is_the_sum_of_the_entries(layers):
    table = made_table()
    shapes = [shape for shape in itertools.product([0, *CHOICES], repeat=layers) if any(shape)][
        :: 7 if layers > 3 else 1
    ]
    np.testing.assert_allclose(table.predict(shapes), [by_hand(table, shape) for shape in shapes])


def test_chain_cost_agrees_with_the_prediction():
    table, config = made_table(), tiny_config()
    shapes = SearchSpace.from_config(config).sample(50, 0, drop_rate=0.3)
    cost = SearchSpace(config).terms(table)
    assert cost.name == "latency"
    np.testing.assert_allclose(chain_cost(cost, config.hidden_size, shapes), table.predict(shapes))


def test_terms_take_integers_and_arrays_and_dropped_layers():
    table = made_table()
    cost = table.chain_cost(tiny_config())
    assert cost.enter(48, 8) + cost.layer(8) == table.seconds.blocks[3, 0]
    assert cost.leave(20) == table.seconds.leave[1]
    both = cost.enter(np.array([48, 8]), np.array([36, 0])) + cost.layer(np.array([36, 0]))
    assert both.tolist() == [table.seconds.blocks[3, 2], 0.0]
    assert (cost.enter(48, 0), cost.layer(0), cost.leave(0)) == (0, 0, 0)
    assert cost.enter(np.array([8, 20])[:, None], np.array([8, 20])).tolist() == table.seconds.blocks[:2, :2].tolist()
    assert np.isnan([cost.enter(48, 9), cost.enter(9, 48), cost.leave(9)]).all()  # measured nowhere


def test_fewer_width_choices_than_measured_will_do():
    cost = made_table().chain_cost(tiny_config(width_choices=[20, 48]))
    assert cost.fixed == 0.75


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([[8, 9, 48]], "knows the widths [8, 20, 36, 48], and 0 for dropped layers, but got [9]."),
        ([[8, 96]], "but got [96]."),
        ([[-8, 48]], "but got [-8]."),
        ([10**12, 48], f"but got [{10**12}]."),
        ([[8.0, 20.0]], "got an array of the NumPy type float64 and the size (1, 2)"),
        ([0, 0], "A shape drops every layer: at least one layer must stay."),
        ([[8, 20], [0, 0]], "A shape drops every layer: at least one layer must stay."),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_predicted_are_refused(shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        made_table().predict(shapes)


@pytest.mark.parametrize("shape", [[8, 20, 36], (0, 48), np.array([48])], ids=str)
def test_one_shape_gives_a_float_and_many_give_an_array(shape):
    table = made_table()
    assert type(table.predict(shape)) is float
    assert table.predict([shape]).tolist() == [table.predict(shape)]
    assert table.predict(np.array([shape])).tolist() == [table.predict(shape)]


def test_widths_cost_no_memory_in_proportion_to_them():
    widths = [8, 20, 36, 2_000_000_000]
    table = made_table(width_choices=widths, sizes={**SIZES, "hidden_size": widths[-1]})
    tracemalloc.start()
    assert table.predict([8, widths[-1]]) > 0
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_another_size_warns_and_names_both():
    config = tiny_config(vocab_size=71, intermediate_size=96)
    message = (
        "The latency table was measured with intermediate_size=80, vocab_size=61, but the configuration has "
        "intermediate_size=96, vocab_size=71: its seconds hold for the former."
    )
    with pytest.warns(UserWarning, match=message):
        made_table().chain_cost(config)


def test_another_attention_warns_and_names_both():
    config = tiny_config(attn_implementation="eager")
    message = "was measured with attention=sdpa, but the configuration has attention=eager: its seconds hold for"
    with pytest.warns(UserWarning, match=message):
        made_table().chain_cost(config)
    made_table(attention="eager").chain_cost(config)


def test_sizes_that_change_no_time_are_let_through():
    made_table().chain_cost(tiny_config(num_hidden_layers=7, max_position_embeddings=99, hidden_dropout_prob=0.5))


def test_width_that_was_not_measured_is_refused():
    message = "has the widths [28], which are not in the latency table: it knows [8, 20, 36, 48]. Measure a table"
    with pytest.raises(ValueError, match=re.escape(message)):
        made_table().chain_cost(tiny_config(width_choices=[8, 28, 48]))


def test_configuration_of_a_subnet_is_checked_by_its_own_widths():
    config = tiny_config()
    assert made_table().chain_cost(config.subnet_config([8, 0, 20])).fixed == 0.75
    with pytest.raises(ValueError, match=re.escape("has the widths [12, 24]")):
        made_table().chain_cost(tiny_config(width_choices=[12, 24, 48]).subnet_config([12, 24, 48]))


def test_width_costs_are_seconds_per_parameter():
    table, space = made_table(), SearchSpace.from_config(tiny_config(num_hidden_layers=2))
    rows = table.width_costs()
    assert [row["width"] for row in rows] == CHOICES
    assert [row["multiple_of_8"] for row in rows] == [True, False, False, True]
    assert [row["head_size"] for row in rows] == [2, 5, 9, 12]
    assert not any(row["multiple_of_64"] or row["head_multiple_of_8"] for row in rows)
    alone = SearchSpace.from_config(tiny_config(num_hidden_layers=1))
    for row, seconds in zip(rows, table.seconds.blocks.diagonal()):
        width = row["width"]
        assert row["seconds"] == seconds
        # A second layer of the same width adds one block to the subnet.
        assert row["parameters"] == space.num_parameters([width] * 2) - alone.num_parameters([width])
        widest = rows[-1]["seconds"] / rows[-1]["parameters"]
        assert row["relative"] == pytest.approx(row["seconds"] / row["parameters"] / widest)
    assert rows[-1]["relative"] == 1


def test_width_costs_name_multiples_of_64_and_head_sizes():
    sizes = {**SIZES, "hidden_size": 128}
    small = Entries(0.5, np.ones((2, 2)), np.ones(2), 0.25)
    rows = made_table(width_choices=[96, 128], sizes=sizes, seconds=small, spread=small).width_costs()
    assert [(row["multiple_of_64"], row["head_multiple_of_8"]) for row in rows] == [(False, True), (True, True)]


# The file


def test_saved_table_is_the_same(tmp_path):
    table = made_table()
    table.save(tmp_path / "table.json")
    assert content(LatencyTable.load(tmp_path / "table.json")) == content(table)


def test_measured_table_is_saved_whole(tmp_path):
    table = LatencyTable.measure(SPACE, sequence_length=5, repeats=1, warmup=0)
    table.save(tmp_path / "table.json")
    assert content(LatencyTable.load(tmp_path / "table.json")) == content(table)


def test_counts_may_be_numpy_integers(tmp_path):
    sizes = {"batch_size": np.int64(1), "sequence_length": np.int64(5), "repeats": np.int64(1)}
    LatencyTable.measure(SPACE, **sizes).save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").sequence_length == 5


def test_file_has_a_line_for_each_attribute(tmp_path):
    made_table().save(tmp_path / "table.json")
    lines = (tmp_path / "table.json").read_text().splitlines()
    assert '  "width_choices": [8, 20, 36, 48],' in lines
    assert len(lines) == 2 + 14


def test_head_is_part_of_what_was_measured(tmp_path):
    encoder = SearchSpace.from_config(tiny_config(), "SuperShaperModel")
    table = LatencyTable.measure(encoder, sequence_length=9, repeats=1, warmup=0)
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").architecture == "SuperShaperModel"
    assert encoder.terms(table).name == "latency"  # warns of nothing
    message = "was measured on a SuperShaperModel, but the subnets are of SuperShaperForMaskedLM: its seconds hold for"
    with pytest.warns(UserWarning, match=message):
        SearchSpace(tiny_config()).terms(table)
    with pytest.raises(ValueError, match=r"was measured with \{'architecture': 'SuperShaperModel'\}, but"):
        LatencyTable.load_or_measure(tmp_path / "table.json", SearchSpace(tiny_config()), sequence_length=9)
    assert made_table().architecture == "SuperShaperForMaskedLM"  # files that do not say it


def test_table_of_another_machine_warns_and_names_both(tmp_path):
    made_table(device="NVIDIA A100").save(tmp_path / "table.json")
    here = re.escape(latency.device_name("cpu"))
    with pytest.warns(
        UserWarning, match=f"was measured on NVIDIA A100, but this machine has {here}.*hold for NVIDIA A100"
    ):
        LatencyTable.load(tmp_path / "table.json")


def test_every_device_of_the_machine_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    made_table(device="GPU 1").save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json").device == "GPU 1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": None}, "device=None must be text"),
        ({"torch_version": 2.11}, "torch_version=2.11 must be text"),
        ({"batch_size": "1"}, "batch_size='1' must be an integer of at least 1"),
        ({"sequence_length": 0}, "sequence_length=0 must be an integer of at least 1"),
        ({"repeats": 2.5}, "repeats=2.5 must be an integer of at least 1"),
        ({"seconds": None}, "NoneType"),
        ({"seconds": {"embeddings": 1}}, "missing 3 required"),
        (
            {"seconds": {"embeddings": "1", "blocks": [], "leave": [], "head": 1}},
            "embeddings='1' must be a finite number",
        ),
        (
            {"seconds": {"embeddings": 1, "blocks": [["1"]], "leave": [], "head": 1}},
            "blocks must be numbers, got an array of the NumPy type <U1",
        ),
        ({"width_choices": [8, 20, 48]}, "seconds: 3 width choices need blocks (3, 3) and leave (3,), got (4, 4)"),
        ({"width_choices": [8, 36, 20, 48]}, "width_choices=[8, 36, 20, 48] must be strictly increasing integers"),
        ({"width_choices": [8, 20, 20, 48]}, "width_choices=[8, 20, 20, 48] must be strictly increasing integers"),
        (
            {"width_choices": [0, 20, 36, 48]},
            "width_choices=[0, 20, 36, 48] must be strictly increasing integers of at",
        ),
        ({"width_choices": [-8, 20, 36, 48]}, "width_choices=[-8, 20, 36, 48] must be strictly increasing integers of"),
        ({"width_choices": []}, "width_choices=[] must be"),
        ({"width_choices": "8, 20"}, "width_choices='8, 20' must be"),
        ({"width_choices": [8.0, 20.0, 36.0, 48.0]}, "width_choices=[8.0, 20.0, 36.0, 48.0] must be"),
        ({"width_choices": [8, 20, 36, 56]}, "must end with hidden_size=48"),
        (
            {"sizes": {"hidden_size": 48}},
            "sizes has the entries ['hidden_size'], but needs ['hidden_act', 'hidden_size'",
        ),
        ({"sizes": {**SIZES, "vocab_size": "61"}}, "vocab_size='61' must be an integer"),
        ({"sizes": {**SIZES, "num_attention_heads": 0}}, "num_attention_heads=0 must be an integer of at least 1"),
        ({"sizes": 3}, "int"),
        ({"extra": 1}, "extra"),
    ],
    ids=str,
)
def test_content_that_is_no_table_is_refused_by_name(tmp_path, changes, reason):
    """Somebody has written the file by hand, so the checksum is right."""
    file = tmp_path / "table.json"
    made_table().save(file)
    write_json(file, latency.FORMAT, {**read_json(file, latency.FORMAT), **changes})
    with pytest.raises(
        ValueError, match=r"table\.json holds no latency table.*Write it with LatencyTable.save"
    ) as error:
        LatencyTable.load(file)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[1, 2]",
        b'"text"',
        b'{"effects": 1}',
        b'{"format": "supershaper-hf predictor 2"}',
        b"[" * 10**5,
    ],
    ids=lambda text: repr(text[:40]),
)
def test_file_that_is_something_else_is_refused_by_name(tmp_path, content):
    (tmp_path / "table.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.json"):
        LatencyTable.load(tmp_path / "table.json")


def test_damaged_file_is_refused_by_name_or_changes_nothing(tmp_path):
    file = tmp_path / "table.json"
    made_table().save(file)
    for damaged in damages(file.read_bytes()):
        file.write_bytes(damaged)
        loaded = load_or_refuse(LatencyTable.load, file)
        assert loaded is None or content(loaded) == content(made_table())


def test_folder_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match=re.escape(f"{tmp_path} is a folder. Give the file in it that LatencyTable.save")
    ):
        LatencyTable.load(tmp_path)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["seconds", "spread"])
def test_impossible_seconds_are_refused(wrong, where):
    numbers = entries()
    numbers.blocks[1, 2] = wrong
    with pytest.raises(ValueError, match=rf"{where} must be finite and not negative, got \[{wrong}\]"):
        made_table(**{where: numbers})


def test_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        LatencyTable.load(tmp_path / "none.json")


def test_table_is_measured_once_and_loaded_afterwards(tmp_path):
    file, conditions = tmp_path / "table.json", {"batch_size": 2, "sequence_length": 5}
    first = LatencyTable.load_or_measure(file, SPACE, **conditions)
    assert content(LatencyTable.load(file)) == content(first)
    assert content(LatencyTable.load_or_measure(file, SPACE, **conditions)) == content(first)


def test_table_of_another_supernet_is_not_taken(tmp_path):
    file, conditions = tmp_path / "table.json", {"batch_size": 2, "sequence_length": 9}
    made_table().save(file)
    for changes, name in (({"width_choices": [8, 48]}, "width_choices"), ({"vocab_size": 99}, "sizes")):
        other = SearchSpace.from_config(tiny_config(**changes))
        with pytest.raises(ValueError, match=re.escape(f"{file} was measured with {{'{name}': ")):
            LatencyTable.load_or_measure(file, other, **conditions)


@pytest.mark.parametrize("other", [{"batch_size": 3}, {"sequence_length": 6}], ids=str)
def test_table_of_other_conditions_is_not_taken(tmp_path, other):
    file, conditions = tmp_path / "table.json", {"batch_size": 2, "sequence_length": 9}
    made_table().save(file)
    (name,) = other
    stored = re.escape(f"{file} was measured with {{'{name}': {conditions[name]}}}, but this call asks for ")
    with pytest.raises(ValueError, match=stored):
        LatencyTable.load_or_measure(file, SPACE, **{**conditions, **other})
