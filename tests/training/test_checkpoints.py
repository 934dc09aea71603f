"""How a run on one process survives: damage, hostile files, signals, SIGKILL, a full disk, text that vanishes."""

import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import SPECIAL_TOKENS, WORDS, assert_same, tiny_model
from launching import fork_server
from safetensors import SafetensorError
from safetensors.torch import load_file
from texts import random_documents
from transformers import AutoModelForMaskedLM, BertTokenizer

from supershaper_hf.data.batches import MicroBatches, fixed_masks
from supershaper_hf.data.documents import load_text
from supershaper_hf.data.sequences import tokenize
from supershaper_hf.training import checkpoints, preparing, run_folder
from supershaper_hf.training import loop as training
from supershaper_hf.training import progress as progress_module
from supershaper_hf.training.arguments import SuperPretrainingArguments
from supershaper_hf.training.checkpoints import (
    MANIFEST,
    find_damage,
    list_checkpoints,
    newest_good_checkpoint,
    seal,
)
from supershaper_hf.training.loop import super_pretrain
from supershaper_hf.training.resuming import read_state
from supershaper_hf.training.sandwich import sandwich_step


STEPS = 8
TIMES = {"tokens_per_second", "share_of_peak"}
FAULTS = [  # the forms in which libraries report a full disk; tokenizers raises a bare Exception
    OSError(28, "No space left on device"),
    RuntimeError("write failed"),
    SafetensorError("I/O error"),
    Exception("No space left on device (os error 28)"),
]


def leave_out_what_is_slow(module):
    """Measuring the peak takes a fifth of a second in each run, drawing the evaluations longer."""
    module.matrix_product_rate = lambda *_: 1e9
    module.plot_evaluations = lambda *_: None


@pytest.fixture(autouse=True, scope="module")
def fast():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("matrix_product_rate", "plot_evaluations"):
            patch.setattr(progress_module, name, None)
        leave_out_what_is_slow(progress_module)
        yield


@pytest.fixture(autouse=True)
def usual_signals():
    """Python's own handler of Ctrl-C, which a job in the background of a shell lacks."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def accelerator():
    return Accelerator()


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    for module in (checkpoints, run_folder):
        monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


def write_weights(folder):
    (folder / "weights.bin").write_bytes(b"0123456789")
    (folder / "part").mkdir(exist_ok=True)
    (folder / "part" / "more.bin").write_bytes(b"abc")


def save(accelerator, folder, *steps, keep=9, write=write_weights):
    """Write small checkpoints; return the last one."""
    for step in steps:
        checkpoint = checkpoints.save_checkpoint(accelerator, folder, step, write, keep)
    return checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps_in(folder):
    return [int(checkpoint.name.removeprefix("checkpoint-")) for checkpoint in list_checkpoints(folder)]


def train(folder=None, text=None, **changes):
    """Train for eight steps with dropout, dropped layers, evaluations and checkpoints; return model and summary."""
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)})
    text = tokenize(random_documents(12, words=27), tokenizer, 12) if text is None else text
    evaluation = fixed_masks(tokenize(random_documents(4, seed=1), tokenizer, 12), tokenizer, 8, mlm_probability=0.4)
    values = {
        "max_steps": STEPS,
        "save_steps": 3,
        "eval_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
    }
    values |= {"learning_rate": 1e-2, "max_length": 12, "drop_rate": 0.3, "gradient_accumulation_steps": 2}
    values["output_dir"] = None if folder is None else str(folder)
    model = tiny_model()
    args = SuperPretrainingArguments(**{**values, **changes})
    return model, super_pretrain(model, tokenizer, text, args, eval_batches=evaluation)


@pytest.fixture(scope="module")
def whole(fast, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def read_summary(folder):
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary.pop("seconds") > 0
    del summary["arguments"]["output_dir"]
    return summary


def assert_equal_runs(folder, whole):
    """Bit for bit: the last and the best model, what was measured on the way, the checkpoints."""
    for name in ("last", "best"):
        ours, expected = (load_file(path / name / "model.safetensors") for path in (folder, whole))
        assert ours.keys() == expected.keys()
        assert [key for key, tensor in ours.items() if not torch.equal(tensor, expected[key])] == []
    assert read_metrics(folder) == read_metrics(whole)
    assert read_summary(folder) == read_summary(whole)
    assert steps_in(folder)[0] == steps_in(whole)[0]
    assert names(folder / "last") == names(whole / "last")
    assert [find_damage(checkpoint) for checkpoint in list_checkpoints(folder)] == [None] * len(steps_in(folder))


# Complete or absent


def test_checkpoint_holds_what_was_written_and_a_manifest_of_it(accelerator, tmp_path):
    folder = save(accelerator, tmp_path / "new" / "run", 3)
    assert folder == tmp_path / "new" / "run" / "checkpoint-00000003"
    assert names(tmp_path / "new" / "run") == ["checkpoint-00000003"]
    assert names(folder) == ["manifest.json", "part", "weights.bin"]
    manifest = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(manifest) == ["part/more.bin", "weights.bin"]
    assert manifest["weights.bin"] == {
        "size": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
    }


def test_checkpoint_appears_only_when_it_is_complete_and_on_the_disk(accelerator, tmp_path, monkeypatch):
    """Files, their folders and the manifest are forced to the disk before the name is given, the name after."""
    done = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda path, target: (done.append(target.name), replace(path, target)))
    save(accelerator, tmp_path, 3)
    named = done.index("checkpoint-00000003")
    before, after = [path for path in done[:named] if path.startswith("/")], done[named + 1 :]
    files = {MANIFEST, "part", "part/more.bin", "weights.bin"}
    partial_folder = tmp_path / ".checkpoint-00000003.partial"
    assert set(before) - {str(partial_folder / f".{MANIFEST}.partial")} == {
        str(partial_folder),
        *(str(partial_folder / file) for file in files),
    }
    assert after == [str(tmp_path)]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_failed_write_leaves_no_checkpoint_and_keeps_the_older_one(accelerator, tmp_path, error):
    older = save(accelerator, tmp_path, 3)

    def fail(folder):
        write_weights(folder)
        raise error

    message = (
        f"{tmp_path / 'checkpoint-00000006'} could not be written: {error}. The newest checkpoint is {older}. Solve "
        "the problem (is the disk full?), then start the same command again: it continues from there."
    )
    with pytest.raises(OSError, match=re.escape(message)) as raised:
        save(accelerator, tmp_path, 6, keep=1, write=fail)
    assert raised.value.__cause__ is error
    assert names(tmp_path) == ["checkpoint-00000003"]
    assert find_damage(older) is None


@pytest.mark.parametrize("function", ["mkdir", "replace"])
def test_failing_folder_is_a_failed_write_too(accelerator, tmp_path, monkeypatch, function):
    save(accelerator, tmp_path, 3)

    def fail(path, *args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Path, function, fail)
        with pytest.raises(OSError, match=r"checkpoint-00000006 could not be written: .*\(is the disk full\?"):
            save(accelerator, tmp_path, 6, write=lambda folder: None)
    assert names(tmp_path) == ["checkpoint-00000003"]


def test_failing_manifest_is_a_failed_write_too(accelerator, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write_json", fail)
    with pytest.raises(OSError, match="could not be written"):
        save(accelerator, tmp_path, 6)
    assert names(tmp_path) == []


def test_mistakes_in_the_code_are_not_called_a_full_disk(accelerator, tmp_path):
    def fail(folder):
        raise TypeError("not JSON")

    with pytest.raises(TypeError, match="not JSON"):
        save(accelerator, tmp_path, 6, write=fail)
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_rotation_keeps_the_newest(accelerator, tmp_path, keep):
    save(accelerator, tmp_path, 8, 9, 10, 100, keep=keep)
    assert steps_in(tmp_path) == [100, 10, 9, 8][:keep]


def test_older_checkpoint_stays_until_the_new_one_is_there(accelerator, tmp_path):
    save(accelerator, tmp_path, 3, keep=1)
    seen = []
    save(accelerator, tmp_path, 6, keep=1, write=lambda folder: seen.append(steps_in(tmp_path)))
    assert seen == [[3]]


def test_checkpoints_after_the_step_cannot_push_out_good_ones(accelerator, tmp_path):
    """A run goes on from step 3 because what is newer is damaged."""
    save(accelerator, tmp_path, 3, 6, 9)
    for step in (6, 9):
        (tmp_path / f"checkpoint-0000000{step}" / "weights.bin").write_bytes(b"")
    good = save(accelerator, tmp_path, 4, keep=2)
    assert newest_good_checkpoint(accelerator, tmp_path) == good
    assert steps_in(tmp_path) == [4, 3]


def test_leftovers_of_a_kill_are_ignored_and_removed(accelerator, tmp_path):
    good = save(accelerator, tmp_path, 3)
    for step in (5, 6):
        leftover = tmp_path / f".checkpoint-0000000{step}.partial"
        shutil.copytree(good, leftover)
        (leftover / "strange.bin").write_bytes(b"?")
    assert newest_good_checkpoint(accelerator, tmp_path) == good
    new = save(accelerator, tmp_path, 6)
    assert names(new) == names(good)
    assert find_damage(new) is None
    assert names(tmp_path) == ["checkpoint-00000003", "checkpoint-00000006"]


def test_new_checkpoint_takes_the_place_of_a_damaged_one(accelerator, tmp_path):
    damaged = save(accelerator, tmp_path, 3)
    (damaged / "strange.bin").write_bytes(b"?")
    (damaged / "weights.bin").unlink()
    assert save(accelerator, tmp_path, 3) == damaged
    assert names(damaged) == ["manifest.json", "part", "weights.bin"]
    assert find_damage(damaged) is None


# Damage


def truncate(folder):
    os.truncate(folder / "weights.bin", 9)


def flip(folder):
    (folder / "weights.bin").write_bytes(b"0123556789")


def put_folder_in_place(folder):
    (folder / "weights.bin").unlink()
    (folder / "weights.bin").mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: None, None),
        (truncate, "weights.bin has 9 bytes instead of 10"),
        (flip, "weights.bin has changed: its checksum is wrong"),
        (lambda folder: (folder / "weights.bin").unlink(), "weights.bin is missing"),
        (lambda folder: (folder / "part" / "more.bin").unlink(), "part/more.bin is missing"),
        (put_folder_in_place, "weights.bin is missing"),
    ],
)
def test_damage_is_found_and_named(accelerator, tmp_path, damage, reason):
    folder = save(accelerator, tmp_path, 3)
    damage(folder)
    assert find_damage(folder) == reason


NO_MANIFEST = "it has no manifest.json that we have written, or a damaged one"


def edit(old, new):
    def change(file):
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))

    return change


MANIFEST_DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_text(""),
    "not UTF-8": lambda file: file.write_bytes(b"\xff\xfe"),
    "cut": lambda file: os.truncate(file, 100),
    "another value": lambda file: file.write_text("null"),
    "another key": edit('"size"', '"siye"'),
    "another file": edit("weights.bin", "weighfs.bin"),
    "another size": edit('"size": 10', '"size": 1000'),
    "another format": edit("checkpoint 1", "checkpoint 0"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGE.values(), ids=MANIFEST_DAMAGE)
def test_folder_whose_manifest_is_not_ours_is_not_touched(accelerator, tmp_path, damage):
    """It may belong to somebody else, so no run goes past it, and none replaces or removes it."""
    save(accelerator, tmp_path, 3)
    folder = save(accelerator, tmp_path, 6)
    damage(folder / MANIFEST)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert find_damage(folder) == NO_MANIFEST
    assert steps_in(tmp_path) == [3]
    message = f"{folder} has the name of a checkpoint, but {NO_MANIFEST}. Move it to another place, or remove it"
    with pytest.raises(ValueError, match=re.escape(message)):
        newest_good_checkpoint(accelerator, tmp_path)
    with pytest.raises(OSError, match=r"without a manifest\.json of ours, has this name; move it away"):
        save(accelerator, tmp_path, 6)
    save(accelerator, tmp_path, 4, 5, keep=1)
    assert steps_in(tmp_path) == [5]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


STRANGERS = (
    "checkpoint-keep",
    "checkpoint-500",
    "checkpoint-000000009",
    "checkpoint-00000009x",
    "checkpoint-notes.txt",
)


@pytest.mark.parametrize("name", STRANGERS)
def test_other_names_are_never_checkpoints(accelerator, tmp_path, name):
    ours = save(accelerator, tmp_path, 3)
    stranger = tmp_path / name
    if name.endswith(".txt"):
        stranger.write_text("notes")
    else:
        shutil.copytree(ours, stranger)  # even with a manifest of ours
    assert list_checkpoints(tmp_path) == [ours]
    assert newest_good_checkpoint(accelerator, tmp_path) == ours
    save(accelerator, tmp_path, 6, 9, keep=1)
    assert names(tmp_path) == sorted(["checkpoint-00000009", name])


def test_link_to_a_checkpoint_is_not_removed(accelerator, tmp_path):
    elsewhere = save(accelerator, tmp_path / "elsewhere", 2)
    link = tmp_path / "run" / "checkpoint-00000002"
    link.parent.mkdir()
    link.symlink_to(elsewhere)
    save(accelerator, tmp_path / "run", 3, keep=1)
    assert link.is_symlink()
    assert find_damage(elsewhere) is None
    assert steps_in(tmp_path / "run") == [3]


def test_strangers_hidden_folders_stay(accelerator, tmp_path):
    for name in (".checkpoint-mine.partial", ".checkpoint-00000001.backup"):
        (tmp_path / name).mkdir()
    save(accelerator, tmp_path, 3)
    assert names(tmp_path) == [".checkpoint-00000001.backup", ".checkpoint-mine.partial", "checkpoint-00000003"]


def test_bad_sector_is_damage_too(accelerator, tmp_path, monkeypatch):
    """A disk answers a read of one with an error."""
    folder = save(accelerator, tmp_path, 3)

    def fail(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoints, "digest", fail)
    assert re.search("Input/output error", find_damage(folder))


def test_newest_good_checkpoint_is_the_newest(accelerator, tmp_path, warnings):
    assert newest_good_checkpoint(accelerator, tmp_path / "absent") is None
    assert newest_good_checkpoint(accelerator, tmp_path) is None
    newest = save(accelerator, tmp_path, 9, 10, 100)
    assert newest_good_checkpoint(accelerator, str(tmp_path)) == newest
    assert warnings == []


def test_damaged_checkpoints_are_passed_over_and_named(accelerator, tmp_path, warnings):
    save(accelerator, tmp_path, 3, 6, 9)
    third, second, first = list_checkpoints(tmp_path)
    truncate(third)
    flip(second)
    assert newest_good_checkpoint(accelerator, tmp_path) == first
    assert warnings == [
        f"{third} is damaged (weights.bin has 9 bytes instead of 10): falling back to the checkpoint before it.",
        f"{second} is damaged (weights.bin has changed: its checksum is wrong): falling back to the checkpoint "
        "before it.",
    ]


def test_only_damaged_checkpoints_are_an_error(accelerator, tmp_path, warnings):
    save(accelerator, tmp_path, 3, 6)
    second, first = list_checkpoints(tmp_path)
    truncate(first)
    flip(second)
    message = (
        f"No checkpoint can be used. {second}: weights.bin has changed: its checksum is wrong; {first}: weights.bin "
        "has 9 bytes instead of 10. Remove these folders to start from the beginning."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        newest_good_checkpoint(accelerator, tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, tmp_path, damage, warnings):
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    newest, older = list_checkpoints(folder)
    assert steps_in(folder) == [8, 6]
    files = {"truncated": "optimizer.safetensors", "flipped": "model.safetensors", "missing": "progress.json"}
    file = newest / files[damage]
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    shutil.rmtree(folder / "last")
    train(folder)
    assert_equal_runs(folder, whole)
    (warning,) = warnings
    assert warning.startswith(f"{newest} is damaged ({file.name} ")
    assert older.exists()


def test_checkpoint_has_what_a_run_goes_on_with(whole):
    newest = list_checkpoints(whole)[0]
    manifest = json.loads((newest / MANIFEST).read_text())["files"]
    assert sorted(manifest) == [
        "config.json", "model.safetensors", "optimizer.safetensors", "progress.json", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert read_state(newest).progress.step == STEPS
    assert_same(load_file(newest / "model.safetensors"), load_file(whole / "last" / "model.safetensors"), atol=0)


class Hostile:
    """An object whose pickle runs code where it is loaded."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


PLACES = (
    "config.json", "model.safetensors", "optimizer.safetensors", "progress.json", "tokenizer.json",
    "tokenizer_config.json",
)  # fmt: skip
OLD_PLACES = (
    "custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", "scaler.pt", "sampler.bin",
    "pytorch_model.bin", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata",
    "dl_state_dict.bin", "configuration_supershaper.py", "modeling_supershaper.py",
)  # fmt: skip


def write_hostile(file, trace):
    if file.suffix == ".py":
        file.write_text(f"from pathlib import Path; Path({str(trace)!r}).touch()")
    elif file.suffix in (".bin", ".pt"):  # the archive of torch.save, with a pickle in it
        archive = BytesIO()
        torch.save(Hostile(trace), archive)
        file.write_bytes(archive.getvalue())
    else:
        file.write_bytes(pickle.dumps(Hostile(trace)))


def test_no_file_of_a_checkpoint_can_run_code(whole, tmp_path):
    """Each file, and each that Accelerate would load, is hostile in turn; the manifest is that of the attacker."""
    trace = tmp_path / "code-ran"
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()
    trace.unlink()
    folder = shutil.copytree(whole, tmp_path / "run", ignore=shutil.ignore_patterns("last", "best", "*-00000006"))
    (checkpoint,) = list_checkpoints(folder)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*PLACES, MANIFEST])
    for place in [*PLACES, *OLD_PLACES]:
        file = checkpoint / place
        file.parent.mkdir(exist_ok=True)
        before = file.read_bytes() if file.exists() else None
        write_hostile(file, trace)
        seal(checkpoint)
        with suppress(ValueError, OSError, SafetensorError):
            train(folder)
        assert not trace.exists(), place
        file.unlink()
        if before is not None:
            file.write_bytes(before)


def test_source_loads_no_pickle():
    """Whoever adds one has to show that it is safe."""
    source = Path(training.__file__).parent
    for file in source.glob("*.py"):
        words = re.findall(r"torch\.load|pickle|load_state\(|joblib|allow_pickle", file.read_text())
        assert words == [], file.name


def test_configuration_of_a_checkpoint_announces_no_code(whole):
    """The code is not beside it. With the package, `from_pretrained` loads it."""
    checkpoint = list_checkpoints(whole)[0]
    config = json.loads((checkpoint / "config.json").read_text())
    assert "auto_map" not in config
    assert list(checkpoint.glob("*.py")) == []
    assert config["architectures"] == ["SuperShaperForMaskedLM"]
    loaded = AutoModelForMaskedLM.from_pretrained(checkpoint)
    assert_same(loaded.state_dict(), AutoModelForMaskedLM.from_pretrained(whole / "last").state_dict(), atol=0)


def test_run_killed_after_reaching_its_target_only_writes_the_last_model(tmp_path):
    changes = {"target_perplexity": 1e9, "max_steps": 6}
    train(tmp_path, **changes)
    expected = read_summary(tmp_path)
    assert (expected["status"], expected["step"]) == ("target reached", 4)
    shutil.rmtree(tmp_path / "last")
    train(tmp_path, **changes)
    assert read_summary(tmp_path) == expected
    assert (tmp_path / "last" / "model.safetensors").exists()


# In processes of their own


def start(*arguments):
    """Run `in_child` in a process of its own; return its exit code."""
    process = fork_server().Process(target=in_child, args=arguments)
    process.start()
    process.join(180)
    assert process.exitcode is not None, "The process hangs."
    return process.exitcode


def in_child(folder, disturb, *arguments):
    signal.alarm(50)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    leave_out_what_is_slow(progress_module)
    disturb(folder, *arguments)
    try:
        train(folder)
    except OSError as error:
        (folder / "error.txt").write_text(str(error))
        sys.exit(3)


def before_step(step, act):
    """Let `act` be called when the step of this number, from 0, begins."""
    calls = []

    def sandwich(*args):
        if len(calls) == step:
            act()
        calls.append(1)
        return sandwich_step(*args)

    training.sandwich_step = sandwich


def signal_itself(folder, number, times):
    before_step(4, lambda: [os.kill(os.getpid(), number) for _ in range(times)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_a_run_with_a_checkpoint(whole, tmp_path, number):
    assert start(tmp_path, signal_itself, number, 1) == 0
    summary = read_summary(tmp_path)
    assert summary["status"] == "interrupted"
    assert summary["step"] in (5, 6)  # the signal comes within step 5, from 1
    assert steps_in(tmp_path) == [summary["step"], 3]
    assert not (tmp_path / "last").exists()
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


def test_second_signal_ends_a_run_at_once_and_it_goes_on_from_the_last_checkpoint(whole, tmp_path):
    assert start(tmp_path, signal_itself, signal.SIGTERM, 2) == -signal.SIGTERM
    assert steps_in(tmp_path) == [3]
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


def wait_in_the_middle(folder):
    def wait():
        (folder / "waiting").touch()
        while (folder / "waiting").exists():
            time.sleep(0.01)

    before_step(4, wait)


def test_second_run_at_the_same_time_stops_and_does_not_disturb_the_first(whole, tmp_path):
    first = fork_server().Process(target=in_child, args=(tmp_path, wait_in_the_middle))
    first.start()
    while not (tmp_path / "waiting").exists() and first.is_alive():
        time.sleep(0.01)
    with pytest.raises(RuntimeError, match=re.escape(f"{tmp_path} is in use by another run.")):
        train(tmp_path)
    (tmp_path / "waiting").unlink()
    first.join(180)
    assert first.exitcode == 0
    assert_equal_runs(tmp_path, whole)


def kill_at(folder, fraction, total, counts):
    """Die by SIGKILL just before some access to a file in the folder: `fraction` of `total` in a whole run."""
    seen = []

    def hook(event, arguments):
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir") and str(folder) in str(arguments[0]):
            seen.append(event)
            if total is None:
                counts.write_text(str(len(seen)))
            elif len(seen) > fraction * total:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.fixture(scope="module")
def accesses(tmp_path_factory):
    """How often a whole run opens, makes, renames or removes something in its folder."""
    folder = tmp_path_factory.mktemp("accesses")
    (folder / "run").mkdir()
    assert start(folder / "run", kill_at, 0, None, folder / "count") == 0
    return int((folder / "count").read_text())


@pytest.mark.parametrize("part", range(5))
def test_run_killed_at_any_moment_goes_on_as_if_nothing_had_happened(whole, accesses, tmp_path, part):
    """A random access in each fifth of the run: most of them are in the middle of writing something."""
    fraction = (part + random.Random(part).random()) / 5
    assert start(tmp_path, kill_at, fraction, accesses, None) == -signal.SIGKILL
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name or "old" in path.name] == []


def fill_disk(folder, limit):
    """From step 5 on no file can grow beyond `limit` bytes: writing fails as on a full disk."""
    before_step(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))


@pytest.mark.parametrize("limit", [150_000, 400_000], ids=["weights", "optimiser"])
def test_full_disk_while_saving(whole, tmp_path, limit):
    assert start(tmp_path, fill_disk, limit) == 3
    message = (tmp_path / "error.txt").read_text()
    (tmp_path / "error.txt").unlink()
    older, newer = tmp_path / "checkpoint-00000003", tmp_path / "checkpoint-00000006"
    assert message.startswith(f"{newer} could not be written: ")
    assert message.endswith(
        f"The newest checkpoint is {older}. Solve the problem (is the disk full?), then start the same command again: "
        "it continues from there."
    )
    assert find_damage(older) is None
    assert steps_in(tmp_path) == [3]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".lock"]
    train(tmp_path)
    assert_equal_runs(tmp_path, whole)


# Text


def test_text_that_vanishes_while_streaming(tmp_path, monkeypatch):
    documents = random_documents(24, words=27)["text"]
    files = [tmp_path / f"{name}.txt" for name in "abc"]
    for index, file in enumerate(files):
        file.write_text("\n".join(documents[8 * index : 8 * index + 8]))
    monkeypatch.setattr(preparing, "MicroBatches", partial(MicroBatches, documents_per_chunk=2))
    whole, folder, elsewhere = tmp_path / "whole", tmp_path / "run", tmp_path / "elsewhere"
    train(whole, load_text(files, streaming=True))
    with monkeypatch.context() as patch:
        calls = []

        def sandwich(*args):
            calls.append(1)
            if len(calls) == 2:
                files[2].rename(elsewhere)
            return sandwich_step(*args)

        patch.setattr(training, "sandwich_step", sandwich)
        with pytest.raises(FileNotFoundError, match=re.escape(f"Text file {files[2]} does not exist any more.")):
            train(folder, load_text(files, streaming=True), save_steps=100)
    assert 2 < len(calls) < STEPS
    assert steps_in(folder)[0] == len(calls)
    elsewhere.rename(files[2])
    train(folder, load_text(files, streaming=True))
    assert_equal_runs(folder, whole)
