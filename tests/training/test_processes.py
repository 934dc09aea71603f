"""Two processes under torch's launcher: they compute what one does, stop together, and lose nothing when one dies.

The launcher runs `work`, at the end of this file, on each process.
"""

import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from conftest import SPECIAL_TOKENS, WORDS, assert_same, randomize, tiny_bert_config, tiny_model
from launching import launch
from safetensors.torch import load_file
from texts import random_documents
from transformers import AutoModelForMaskedLM, BertModel, BertTokenizer

from supershaper_hf import SearchSpace
from supershaper_hf.data.batches import fixed_masks
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.processes import start_accelerator
from supershaper_hf.search.evaluation import evaluate_shapes
from supershaper_hf.training import checkpoints, run_folder
from supershaper_hf.training import loop as training
from supershaper_hf.training import progress as progress_module
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.checkpoints import find_damage, list_checkpoints
from supershaper_hf.training.loop import super_pretrain
from supershaper_hf.training.resuming import read_state
from supershaper_hf.training.sandwich import sandwich_step, step_shapes
from supershaper_hf.training.teacher import OutsideTeacher


STEPS = 7
TIMES = {"tokens_per_second", "share_of_peak"}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Trained without dropout at a global batch of 8; on two processes with half the `batch_size`.
COMPARED = {
    "sandwich": {},
    "dropped layers": {"drop_rate": 0.5, "random_shapes": 2},
    "layer losses": {"hidden_weight": 1.0, "attention_weight": 1.0, "gradient_accumulation_steps": 2},
    "random": {"sampling": "random", "random_shapes": 2, "drop_rate": 0.5, "gradient_accumulation_steps": 2},
    "adaptive": {"divergence": "alpha", "weight_decay": 0.1, "lr_scheduler_type": "cosine"},
    "by width": {
        "bottlenecks": "by_width",
        "shared_learning_rate_scale": 0.1,
        "sampling": "random",
        "drop_rate": 0.2,
        "weight_decay": 0.1,
    },
    "without labels": {
        "bottlenecks": "by_width",
        "mlm_probability": 0,
        "state_weight": 1.0,
        "pooled_weight": 1.0,
        "sampling": "smallest",
        "drop_rate": 0.5,
        "gradient_accumulation_steps": 2,
    },
}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "SuperShaperLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",  # Accelerate's default; checkpoints hold whole tensors all the same
}


def make_tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})


def documents(n=24):
    return random_documents(n, words=27)  # whose sequences are of unequal length


def evaluation_batches(count=3):
    tokenizer = make_tokenizer()
    return fixed_masks(tokenize(random_documents(8, seed=1), tokenizer, 12), tokenizer, 8, mlm_probability=0.4)[:count]


def train(folder=None, stream=False, dropout=True, batch_size=4, bottlenecks="shared", **changes):
    """Train a tiny model for some steps; return it and the summary."""
    tokenizer = make_tokenizer()
    text = documents().to_iterable_dataset() if stream else tokenize(documents(), tokenizer, 12)
    model = tiny_model(bottlenecks=bottlenecks, **({} if dropout else NO_DROPOUT))
    values = {
        "max_steps": STEPS,
        "save_steps": 2,
        "eval_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": batch_size,
    }
    values |= {"learning_rate": 1e-3, "max_length": 12, "output_dir": None if folder is None else str(folder)}
    args = SuperPretrainingArguments(**{**values, **changes})
    teacher = OutsideTeacher(randomize(BertModel(tiny_bert_config()), seed=1)) if args.state_weight else None
    return model, super_pretrain(model, tokenizer, text, args, eval_batches=evaluation_batches(), teacher=teacher)


def step_losses(summary):
    return [record["loss"] for record in summary.log_history if "loss" in record]


def evaluations(summary):
    return [record["evaluation"] for record in summary.log_history if "evaluation" in record]


def result(model, summary):
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"weights": weights, "losses": step_losses(summary), "evaluations": evaluations(summary)}


# Started once for all tests


@pytest.fixture(autouse=True, scope="module")
def no_measured_peak():
    """Measuring it takes a fifth of a second in each run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_module, "matrix_product_rate", lambda *_: 1e9)
        yield


def read_metrics(folder):
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def steps_in(folder):
    return [int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in list_checkpoints(folder)]


DISTURBED = ("terminated", "died", "orphaned")


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """Runs at once: one launcher gets SIGTERM, one SIGKILL; in another run a process kills itself in step 4, from 0."""
    folder = tmp_path_factory.mktemp("disturbed")
    launchers = {name: launch(2, work, name, folder / name, log=folder / f"{name}.log") for name in DISTURBED}
    for name, act in (("terminated", "terminate"), ("orphaned", "kill")):
        wait_for(lambda name=name: len(read_metrics(folder / name)) >= 2)
        getattr(launchers[name], act)()
    found = {}
    for name, launcher in launchers.items():
        launcher.join(120)
        if name != "died":
            wait_for(lambda name=name: all((folder / name / f"end{rank}.json").exists() for rank in (0, 1)))
        file = folder / name / "killed"
        found[name] = {
            "folder": folder / name,
            "code": launcher.exitcode,
            "output": (folder / f"{name}.log").read_text(),
            "checkpoints": steps_in(folder / name),
            "seconds": time.time() - file.stat().st_mtime if file.exists() else None,
        }
    return found


def wait_for(condition, seconds=90):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


@pytest.fixture(scope="module")
def together(disturbed, tmp_path_factory):
    """What each of the two processes computed, and went on with."""
    folder = tmp_path_factory.mktemp("together")
    train(folder / "one", max_steps=3, save_steps=3)
    for name, run in disturbed.items():
        shutil.copytree(run["folder"], folder / name)
    found = run_to_the_end("together", folder)
    for rank, under_fsdp in zip(found, run_to_the_end("fsdp", folder, attempts=2), strict=True):
        rank.update(under_fsdp)
    return folder, found


def run_to_the_end(mode, folder, attempts=1):
    """Return what each of the two processes found.

    `attempts` is for FSDP alone, which Accelerate offers on devices only: torch 2.13 has crashed once in hundreds of
    runs while gloo gathered the parts of a tensor on the CPU (a segmentation fault in its `wait_tensor`).
    """
    log = folder / f"{mode}.log"
    launcher = launch(2, work, mode, folder, log=log)
    launcher.join(400)
    if attempts > 1 and "Segmentation fault" in log.read_text():
        for run in folder.glob(f"*{mode}*/"):
            shutil.rmtree(run)
        return run_to_the_end(mode, folder, attempts - 1)
    assert launcher.exitcode == 0, log.read_text()
    return [torch.load(folder / f"{mode}{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def folder(together):
    return together[0]


@pytest.fixture(scope="module")
def ranks(together):
    return together[1]


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    for module in (checkpoints, run_folder):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


def without_key_biases(weights):
    """Softmax does not see them, so their gradient is rounding noise, which AdamW scales up."""
    return {name: tensor for name, tensor in weights.items() if not name.endswith("key.bias")}


def without_times(records):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_same_run(actual, expected):
    """Bit for bit."""
    assert_same(actual["weights"], expected["weights"], atol=0)
    assert actual["losses"] == expected["losses"]
    assert actual["evaluations"] == expected["evaluations"]


# As one


def test_launcher_started_two_processes(ranks):
    assert [rank["processes"] for rank in ranks] == [2, 2]


def test_processes_draw_the_same_shapes_and_read_different_text(ranks):
    first, second = (rank["steps"] for rank in ranks)
    assert len(first) == STEPS
    args = SuperPretrainingArguments(**COMPARED["dropped layers"])
    space = SearchSpace.from_config(tiny_model().config)
    assert [step["shapes"] for step in first] == [step_shapes(space, args, number) for number in range(STEPS)]
    assert [step["shapes"] for step in first] == [step["shapes"] for step in second]
    assert all(a["inputs"] != b["inputs"] for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", COMPARED)
def test_two_processes_compute_what_one_does_at_the_same_global_batch(ranks, name):
    model, summary = train(dropout=False, batch_size=8, **COMPARED[name])
    for rank in ranks:
        torch.testing.assert_close(rank[name]["losses"], step_losses(summary), atol=1e-4, rtol=0)
        assert_same(without_key_biases(rank[name]["weights"]), without_key_biases(model.state_dict()), atol=1e-4)


def moments(run):
    return load_file(list_checkpoints(run)[0] / "optimizer.safetensors")


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_parameters_that_no_shape_of_a_step_uses_are_left_alone(ranks, folder, tmp_path, kind):
    """With weights by width and no largest shape. Each parameter has the same number of updates as on one process."""
    model, _ = train(tmp_path / "run", dropout=False, batch_size=8, **COMPARED["by width"])
    expected, found = moments(tmp_path / "run"), moments(folder / f"{kind} unused")
    updates = {int(value) for name, value in expected.items() if name.endswith("/step")}
    assert len(updates) > 1
    assert updates <= set(range(1, STEPS + 1))
    kept = {name: value for name, value in found.items() if "key.bias/" not in name}
    assert_same(kept, {name: value for name, value in expected.items() if "key.bias/" not in name}, atol=1e-4)
    weights = load_file(folder / f"{kind} unused" / "last" / "model.safetensors")
    trained = {name: tensor for name, tensor in model.state_dict().items() if name in weights}
    assert_same(without_key_biases(weights), without_key_biases(trained), atol=1e-3)


@pytest.mark.parametrize("name", [*COMPARED, "whole", "resumed", "stream", "resumed stream", *DISTURBED])
def test_processes_end_with_the_same_weights(ranks, name):
    """And measured the same; only the main one keeps records of what was before a run went on."""
    first, second = (rank[name] for rank in ranks)
    assert second["losses"]
    kept = {key: first[key][-len(second[key]) :] for key in ("losses", "evaluations")}
    assert_same_run({**first, **kept}, second)


def test_dropout_differs_between_processes(ranks):
    """On the same sequences: else the noise of a step would be that of one process."""
    assert not torch.equal(ranks[0]["noise"], ranks[1]["noise"])


def test_counters_are_those_of_all_processes(ranks):
    _, summary = train(dropout=False, batch_size=8)
    for rank in ranks:
        assert rank["counters"] == {name: getattr(summary.progress, name) for name in rank["counters"]}


@pytest.mark.parametrize("count", [1, 2, 3])
def test_evaluation_does_not_depend_on_the_number_of_processes(ranks, count):
    """Also where the batches cannot be shared out evenly, or one process has none."""
    model = tiny_model()
    expected = evaluate_shapes(model, evaluation_batches(count), [[48, 48, 48], [8, 0, 36]])
    for rank in ranks:
        assert rank["evaluated"][count] == ranks[0]["evaluated"][count]
        for record, wanted in zip(rank["evaluated"][count], expected, strict=True):
            assert record == {key: pytest.approx(value, abs=1e-6, rel=1e-6) for key, value in wanted.items()}


def test_only_one_process_writes(folder):
    assert Counter(record["step"] for record in read_metrics(folder / "whole")) == dict.fromkeys(
        range(1, STEPS + 1), 1
    ) | {3: 2, 6: 2, STEPS: 2}
    newest = list_checkpoints(folder / "whole")[0]
    assert find_damage(newest) is None
    assert len(read_state(newest).positions) == 2


# Going on


@pytest.mark.parametrize(("name", "expected"), [("resumed", "whole"), ("resumed stream", "stream")])
def test_run_that_goes_on_equals_one_that_was_never_stopped(ranks, folder, name, expected):
    for rank in ranks:
        assert_same_run({**rank[name], **shown(folder / name)}, {**rank[expected], **shown(folder / expected)})
    assert without_times(read_metrics(folder / name)) == without_times(read_metrics(folder / expected))


def shown(folder):
    """What the main process recorded."""
    records = read_metrics(folder)
    return {
        "losses": [record["loss"] for record in records if "loss" in record],
        "evaluations": [record["evaluation"] for record in records if "evaluation" in record],
    }


@pytest.mark.parametrize("name", ["terminated", "orphaned"])
def test_signal_to_the_launcher_or_its_death_stops_all_processes_after_a_checkpoint(disturbed, name):
    run = disturbed[name]
    ends = [json.loads((run["folder"] / f"end{rank}.json").read_text()) for rank in (0, 1)]
    assert ends[0] == ends[1]
    assert ends[0]["status"] == "interrupted"
    assert 2 <= ends[0]["step"] < STEPS
    assert run["checkpoints"][0] == ends[0]["step"]
    assert not (run["folder"] / "last").exists()


def test_death_of_one_process_ends_the_run_with_an_error(disturbed):
    run = disturbed["died"]
    assert run["code"] != 0
    # The launcher reports what it sees first: the dead process, or the other one, whose connection is gone.
    assert re.search(r"SIGKILL|exitcode *: -9|Connection (reset|closed) by peer", run["output"])
    assert run["seconds"] < 60
    assert run["checkpoints"] == [4, 2]
    assert not (run["folder"] / "last").exists()
    assert [find_damage(checkpoint) for checkpoint in list_checkpoints(run["folder"])] == [None, None]


@pytest.mark.parametrize("name", DISTURBED)
def test_disturbed_run_goes_on_as_if_nothing_had_happened(ranks, folder, name):
    for rank in ranks:
        assert_same(rank[name]["weights"], rank["whole"]["weights"], atol=0)
    assert without_times(read_metrics(folder / name)) == without_times(read_metrics(folder / "whole"))
    for model in ("last", "best"):
        weights = (load_file(folder / run / model / "model.safetensors") for run in (name, "whole"))
        assert_same(*weights, atol=0)


def test_one_process_goes_on_with_the_stored_text_of_two(folder, tmp_path, warnings, monkeypatch):
    """At the same global batch it reads on where they were."""
    run = shutil.copytree(folder / "to go on", tmp_path / "run")
    expected, _ = train(dropout=False, batch_size=8)
    model, summary = train(run, dropout=False, batch_size=8)
    assert summary.status == "finished"
    assert "processes was 2, is 1" in warnings[0]
    assert_same(without_key_biases(model.state_dict()), without_key_biases(expected.state_dict()), atol=1e-4)


def test_two_processes_go_on_with_the_stored_text_of_one(ranks):
    for rank in ranks:
        assert rank["from one"] == {"status": "finished", "step": STEPS}
        assert "processes was 1, is 2" in rank["warnings of one"][0]


def test_one_process_cannot_go_on_with_the_stream_of_two(folder, tmp_path, warnings):
    run = shutil.copytree(folder / "stream", tmp_path / "run")
    message = r"which cannot change within a run: processes was 2, is 1\. Start again with the old values"
    with pytest.raises(ValueError, match=message):
        train(run, stream=True)


# FSDP, as Accelerate runs it


def test_fsdp_trains_as_ddp_does(ranks, folder):
    for rank in ranks:
        run = rank["fsdp"]
        assert run["parameter"] == "DTensor"
        torch.testing.assert_close(run["losses"], rank["sandwich"]["losses"], atol=1e-4, rtol=0)
        torch.testing.assert_close(run["evaluations"], rank["sandwich"]["evaluations"], atol=1e-3, rtol=1e-3)
    last = AutoModelForMaskedLM.from_pretrained(folder / "fsdp" / "last").state_dict()
    expected = ranks[0]["sandwich"]["weights"]
    assert_same(without_key_biases(last), without_key_biases(expected), atol=1e-3)


def test_fsdp_trains_without_labels_as_ddp_does(ranks):
    for rank in ranks:
        run, expected = rank["fsdp without labels"], rank["without labels"]
        torch.testing.assert_close(run["losses"], expected["losses"], atol=1e-4, rtol=0)
        torch.testing.assert_close(run["evaluations"], expected["evaluations"], atol=1e-3, rtol=1e-3)


def test_fsdp_run_goes_on(ranks, folder):
    losses = [rank["losses"] for rank in (ranks[0]["resumed fsdp"], ranks[0]["fsdp"])]
    assert losses[0] == losses[1]
    weights = (load_file(folder / run / "last" / "model.safetensors") for run in ("resumed fsdp", "fsdp"))
    assert_same(*weights, atol=0)
    assert find_damage(list_checkpoints(folder / "resumed fsdp")[0]) is None


def test_run_goes_on_without_fsdp_from_a_checkpoint_made_under_it(ranks, folder, tmp_path):
    run = shutil.copytree(folder / "fsdp", tmp_path / "run", ignore=shutil.ignore_patterns("*-0000000[67]", "last"))
    assert steps_in(run)
    model, summary = train(run, dropout=False, batch_size=8)
    assert (summary.status, summary.progress.step) == ("finished", STEPS)
    expected = ranks[0]["sandwich"]["weights"]
    assert_same(without_key_biases(model.state_dict()), without_key_biases(expected), atol=1e-3)


# What the launcher runs


def before_step(number, act):
    """Let `act` be called when the step of this number, from 0, begins; `None`: each step."""
    calls = []

    def sandwich(*args):
        if number in (None, len(calls)):
            act()
        calls.append(1)
        return sandwich_step(*args)

    training.sandwich_step = sandwich


def fail():
    raise RuntimeError("power cut")


def interrupted_and_resumed(folder, **changes):
    """Stop in step 5, from 0, without a checkpoint of it; go on with a model whose weights are of no use."""
    before_step(5, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        train(folder, **changes)
    training.sandwich_step = sandwich_step
    return train(folder, **changes)


def work(mode, folder):
    signal.alarm(360)  # ends a deadlock
    progress_module.matrix_product_rate = lambda *_: 1e9
    progress_module.plot_evaluations = lambda *_: None  # slow, and drawn by one process only
    accelerator = start_accelerator()
    folder, rank = Path(folder), accelerator.process_index
    if mode == "together":
        torch.save(work_together(accelerator, folder), folder / f"{mode}{rank}.pt")
    elif mode == "fsdp":
        torch.save(work_under_fsdp(folder), folder / f"{mode}{rank}.pt")
    else:
        disturb(mode, folder, rank)
    torch.distributed.destroy_process_group()


def disturb(mode, folder, rank):
    def die():
        if rank == 1:
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    before_step(*((4, die) if mode == "died" else (None, lambda: time.sleep(0.3))))
    _, summary = train(folder)
    end = {"status": summary.status, "step": summary.progress.step}
    (folder / f"end{rank}.json").write_text(json.dumps(end))


def work_together(accelerator, folder):
    found = {"processes": accelerator.num_processes, "steps": []}

    def record(accelerator, model, micro_batches, shapes, objective):
        found["steps"].append({"shapes": shapes, "inputs": micro_batches[0]["input_ids"].tolist()})
        return sandwich_step(accelerator, model, micro_batches, shapes, objective)

    for name, changes in COMPARED.items():
        training.sandwich_step = record if name == "dropped layers" else sandwich_step
        model, summary = train(folder / "ddp unused" if name == "by width" else None, dropout=False, **changes)
        found[name] = result(model, summary)
        if name == "sandwich":
            counters = ("step", "sequences", "tokens", "labelled", "skipped_steps")
            found["counters"] = {counter: getattr(summary.progress, counter) for counter in counters}
    found["evaluated"] = {
        count: evaluate_shapes(
            tiny_model(), evaluation_batches(count), [[48, 48, 48], [8, 0, 36]], accelerator=accelerator
        )
        for count in (1, 2, 3)
    }
    before_step(0, lambda: found.update(noise=torch.rand(4)))
    train(max_steps=1)
    training.sandwich_step = sandwich_step

    found["whole"] = result(*train(folder / "whole"))
    found["resumed"] = result(*interrupted_and_resumed(folder / "resumed"))
    found["stream"] = result(*train(folder / "stream", stream=True))
    found["resumed stream"] = result(*interrupted_and_resumed(folder / "resumed stream", stream=True))
    for name in DISTURBED:
        found[name] = result(*train(folder / name))
    before_step(5, fail)
    with pytest.raises(RuntimeError, match="power cut"):
        train(folder / "to go on", dropout=False)
    training.sandwich_step = sandwich_step
    found["warnings of one"] = []
    run_folder.logger.warning = found["warnings of one"].append
    _, summary = train(folder / "one")
    found["from one"] = {"status": summary.status, "step": summary.progress.step}
    return found


def work_under_fsdp(folder):
    """Accelerate offers FSDP on devices only, but its code runs on the CPU too."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    os.environ.update(FSDP)
    AcceleratorState._reset_state()
    model, summary = train(folder / "fsdp", dropout=False, save_total_limit=9)
    found = {}
    found["fsdp"] = {
        "parameter": type(next(model.parameters())).__name__,
        "losses": step_losses(summary),
        "evaluations": evaluations(summary),
    }
    train(folder / "fsdp unused", dropout=False, **COMPARED["by width"])
    _, summary = train(dropout=False, **COMPARED["without labels"])
    found["fsdp without labels"] = {"losses": step_losses(summary), "evaluations": evaluations(summary)}
    _, summary = interrupted_and_resumed(folder / "resumed fsdp", dropout=False)
    found["resumed fsdp"] = {"losses": step_losses(summary)}
    return found
