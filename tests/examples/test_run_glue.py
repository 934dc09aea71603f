"""`examples/run_glue.py` on a tiny task: on one process and on two, with options of every kind."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import assert_same
from launching import start
from safetensors.torch import load_file
from tiny_tasks import write_supernet, write_task


SCRIPT = Path(__file__).parents[2] / "examples" / "run_glue.py"
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def options(tokenizer, tmp_path):
    """The options of a run without dropout, but for its batch size and its output folder."""
    train, validation = write_task(tmp_path)
    supernet = write_supernet(tmp_path / "supernet", tokenizer, **NO_DROPOUT)
    return [
        *("--model", supernet, "--task", "sst2", "--train_file", train, "--validation_files", validation),
        *("--shape", "36", "20", "48", "--max_length", "12", "--learning_rate", "1e-3", "--num_train_epochs", "2"),
        *("--use_cpu", "--disable_tqdm", "True"),
    ]


def test_script_prints_shape_and_scores(script, options, tmp_path, capsys):
    seeds = ["--seeds", "0", "1", "--per_device_train_batch_size", "8"]
    assert script.main([*options, *seeds, "--output_dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "shape [36, 20, 48], seeds [0, 1], model of seed" in printed
    mean, spread = (results[key]["validation"]["accuracy"] for key in ("mean", "spread"))
    assert f"{mean:.4f} ± {spread:.4f}" in printed
    assert script.main([*options, "--seeds", "1", *seeds[3:], "--output_dir", str(tmp_path / "out")]) == 0
    again = capsys.readouterr().out
    assert again.startswith("shape")
    assert printed.endswith(again)  # what is trained prints its loss first


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")  # of a model of a few steps
def test_script_prints_every_measured_shape_of_a_sandwich(script, options, tmp_path, capsys):
    without_shape = [each for each in options if each not in ("--shape", "36", "20", "48")]
    script.main([*without_shape, "--sandwich", "--num_shapes", "12", "--output_dir", str(tmp_path / "out")])
    table = capsys.readouterr().out.partition("task_loss")[2]
    parameters = [int(number.replace(",", "")) for number in re.findall(r"^[a-z].*?  +([\d,]+)  ", table, re.MULTILINE)]
    assert len(parameters) >= 12
    assert parameters == sorted(parameters, reverse=True)


def test_two_processes_fine_tune_as_one_does_at_the_same_global_batch(script, options, tmp_path):
    together = start(2, SCRIPT, *options, "--per_device_train_batch_size", "4", "--output_dir", tmp_path / "two")
    script.main([*options, "--per_device_train_batch_size", "8", "--output_dir", str(tmp_path / "one")])
    output, _ = together.communicate(timeout=300)
    assert together.returncode == 0, output
    assert output.count("shape [36, 20, 48]") == 1
    weights = [load_file(tmp_path / run / "model" / "model.safetensors") for run in ("one", "two")]
    for found in weights:  # softmax does not see biases of keys: their gradient is noise, which AdamW scales up
        for name in [name for name in found if name.endswith("key.bias")]:
            del found[name]
    assert_same(*weights, atol=1e-4)
    results = [
        json.loads((tmp_path / run / "results.json").read_text())["mean"]["validation"] for run in ("one", "two")
    ]
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--task", "sst3"], "--task='sst3' is unknown. Allowed: 'cola', 'sst2'"),
        (["--max_cost", "-1", "--task", "sst2"], "max_cost=-1.0 must be"),
        (["--task", "sst2"], "--model or --output_dir is missing"),
    ],
)  # fmt: skip
def test_wrong_options_end_in_one_line(changes, message, script, capsys):
    with pytest.raises(SystemExit):
        script.main(changes)
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) <= 4
