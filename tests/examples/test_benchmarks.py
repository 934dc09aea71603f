"""Every benchmark can be imported and has the options that the documentation names. So none is left behind.

`inference.py` is also run, with tiny models.
"""

import importlib
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same, randomize

from supershaper_hf import SuperShaperConfig, SuperShaperModel
from supershaper_hf.files import read_json


ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
NAMES = sorted({file.stem for file in BENCHMARKS.glob("*.py")} - {"sweeps"})  # which is no script
DOCUMENTS = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *BENCHMARKS.glob("*.py")]


def documented_options(name):
    """The options in the commands that run a benchmark. A command ends with its line, or with a backtick."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in DOCUMENTS).replace("\\\n", " ")
    commands = re.findall(rf"python benchmarks/{name}\.py([^`\n]*)", text)
    return {option for command in commands for option in re.findall(r"--\w+", command)}


def test_options_are_found_in_the_documentation():
    assert {"--model", "--text", "--num_shapes"} <= documented_options("rounds")


@pytest.fixture
def load(monkeypatch):
    """A function that imports a benchmark by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)  # where Python looks when it runs the script
    modules = set(sys.modules)
    yield importlib.import_module
    for each in {*NAMES, "sweeps"}.difference(modules):  # some import each other, and other tests may use these names
        sys.modules.pop(each, None)


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_has_the_options_that_the_documentation_names(name, load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    script = load(name)
    assert Path(script.__file__) == BENCHMARKS / f"{name}.py"
    with pytest.raises(SystemExit, match="0"):
        script.main()
    printed = capsys.readouterr().out
    assert documented_options(name) <= set(re.findall(r"--\w+", printed))
    assert script.__doc__.splitlines()[0] in printed


# inference.py


def test_inference_times_every_model_in_interleaved_sweeps(load, monkeypatch, capsys, tmp_path):
    file = tmp_path / "inference.json"
    monkeypatch.setattr(sys, "argv", ["inference.py", "--quick", "--formats", "pytorch", "--output", str(file)])
    script = load("inference")
    script.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    results = read_json(file, script.FILE_FORMAT)
    models = [script.BERT, script.HALF, script.SUBNET, script.UNMERGED, script.SMALL_BERT, script.SMALL_SUBNET]
    assert [row[0] for row in rows[2:]] == models
    seconds = {(each["model"], each["batch_size"]): each["seconds"] for each in results["times"]}
    assert list(seconds) == [(model, batch_size) for batch_size in (1, 3) for model in models]
    assert {key: len(each) for key, each in seconds.items()} == {key: {1: 2, 3: 3}[key[1]] for key in seconds}
    for row in rows[2:]:
        for batch_size, time, share in [(1, *row[4:6]), (3, *row[6:8])]:
            own, base = seconds[row[0], batch_size], seconds[script.ORIGIN.get(row[0], script.BERT), batch_size]
            assert float(time.split()[0]) == pytest.approx(1e3 * statistics.median(own), abs=0.06)
            assert float(share) == pytest.approx(statistics.median(a / b for a, b in zip(own, base)), abs=0.006)
    for target in results["targets"]:
        first, second = (seconds[model, 3] for model, _ in (target["time"], target["of"]))
        assert target["measured"] == pytest.approx(statistics.median(a / b for a, b in zip(first, second)))
    parameters = {row[0]: int(row[1].replace(",", "")) for row in rows[2:]}
    assert parameters[script.HALF] == pytest.approx(parameters[script.SUBNET], rel=0.01)


def test_unmerged_subnet_computes_what_the_supernet_does(load):
    script, shape = load("inference"), [40, 72]
    config = SuperShaperConfig(**script.QUICK)
    supernet, unmerged = randomize(SuperShaperModel(config)), script.unmerged_subnet(config, shape).eval()
    merged = supernet.extract_subnet(shape).state_dict()
    unmerged.load_state_dict({name: merged[name] for name in merged if "bottleneck" not in name}, strict=False)
    with torch.no_grad():
        for index, width in enumerate(shape):
            for kind, part in [("input_bottleneck", slice(width)), ("output_bottleneck", (slice(None), slice(width)))]:
                own, whole = (getattr(model.encoder, kind)[index] for model in (unmerged, supernet))
                own.weight.copy_(whole.weight[part])
                own.bias.copy_(whole.bias[: len(own.bias)])
        ids = torch.randint(5, 50, (10, 9))  # so many tokens that the supernet merges its bottlenecks
        assert_same(unmerged(ids).last_hidden_state, supernet(ids, shape=shape).last_hidden_state)
    assert unmerged.num_parameters() > supernet.extract_subnet(shape).num_parameters()


def test_onnx_files_of_inference_hold_the_model(load, tmp_path):
    script = load("inference")
    model = script.make_models(quick=True, seed=0)[script.UNMERGED]
    contenders = script.make_contenders({"unmerged": model}, list(script.FORMATS), 1, tmp_path)
    batch = script.make_batch(2, 9, 50, seed=0)
    expected, exact, rounded = (torch.as_tensor(contender.run(batch)[0]) for contender in contenders.values())
    assert [kind for _, kind in contenders] == ["pytorch", "onnx", "int8"]
    assert_same(exact, expected)
    assert 1e-4 < (rounded - expected).abs().max() < 0.5
    assert (
        0.5 < contenders["unmerged", "int8"].size / contenders["unmerged", "onnx"].size < 0.6
    )  # bottlenecks are whole
