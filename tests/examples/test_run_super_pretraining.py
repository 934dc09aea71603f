"""examples/run_super_pretraining.py: options from flags and YAML, where models come from, how runs continue."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from accelerate.commands import launch
from conftest import assert_same, randomize, tiny_bert_config, tiny_model
from hub_server import HubServer
from safetensors.torch import load_file
from texts import random_documents
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM, BertModel

from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM, read_sentence_encoder
from supershaper_hf.processes import main_process_first
from supershaper_hf.publish.sentences import sentence_encoder_files, write_files


WITHOUT_LABELS = ["--teacher=t", "--state_weight=1"]
EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPT = EXAMPLES / "run_super_pretraining.py"
CALIBRATION = ["--calibration_tokens=100", "--bottlenecks=by_width"]
STEPS = ["--max_steps=2", "--per_device_train_batch_size=4", "--max_length=12", "--logging_steps=1"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("run_super_pretraining", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bert(tokenizer, tmp_path):
    folder = tmp_path / "bert"
    randomize(BertForMaskedLM(tiny_bert_config(vocab_size=len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def headless(tokenizer, tmp_path):
    """A BERT without a masked-LM head."""
    folder = tmp_path / "headless"
    randomize(BertModel(tiny_bert_config(vocab_size=len(tokenizer)))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "documents.txt"
    file.write_text("\n".join(random_documents(40, words=20)["text"]))
    return file


@pytest.fixture
def run(script, text, tmp_path, monkeypatch, capsys):
    """Run the script in this process; return what it prints and its output folder."""

    def run(model, *arguments, output="output"):
        folder = tmp_path / output
        flags = [f"--model_name_or_path={model}", f"--train_files={text}", f"--output_dir={folder}", *STEPS]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags, *map(str, arguments)])
        assert script.main() == 0
        return capsys.readouterr().out, folder

    return run


def summary(folder):
    return json.loads((folder / "training_summary.json").read_text())


def weights(folder):
    return SuperShaperForMaskedLM.from_pretrained(folder / "last").state_dict()


# Options


REQUIRED = {"model_name_or_path": "b", "train_files": ["a.txt", "c.txt"], "output_dir": "o"}


def parse(script, *argv):
    required = ["--model_name_or_path=b", "--train_files", "a.txt", "c.txt", "--output_dir=o"]
    return script.parse_arguments([*required, *argv])


def write_yaml(folder, **options):
    """Write the options, and those without which the script does not start."""
    (folder / "run.yaml").write_text(yaml.safe_dump(REQUIRED | options))
    return str(folder / "run.yaml")


def refusal(capsys, act, *args):
    """The message with which the command line is refused."""
    with pytest.raises(SystemExit) as stop:
        act(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_flags_reach_both_sets_of_options(script):
    options, args = parse(script, "--calibration_tokens=9", "--shape", "8", "0", "36", "--sampling=fixed")
    assert (options.model_name_or_path, options.train_files, options.calibration_tokens) == ("b", ["a.txt", "c.txt"], 9)
    assert (args.output_dir, args.shape, args.sampling) == ("o", [8, 0, 36], "fixed")


def test_yaml_holds_the_same_options_and_flags_change_them(script, tmp_path):
    file = write_yaml(tmp_path, learning_rate=1e-3, streaming=True, width_choices=[8, 48], max_steps=7)
    options, args = script.parse_arguments([file, "--max_steps=9"])
    assert (options.model_name_or_path, options.train_files, options.width_choices, options.streaming) == (
        "b",
        ["a.txt", "c.txt"],
        [8, 48],
        True,
    )
    assert (args.output_dir, args.learning_rate, args.max_steps) == ("o", 1e-3, 9)


def test_a_value_in_yaml_means_what_it_means_on_the_command_line(script, tmp_path):
    """YAML reads `no` as a truth value and `5e-4` as text."""
    lines = "train_files: a.txt\nmodel_name_or_path: b\noutput_dir: o\nmixed_precision: no\nlearning_rate: 5e-4\n"
    (tmp_path / "run.yaml").write_text(f"{lines}report_to: wandb\nteacher_layer: -2\ncross_documents: yes\n")
    options, args = script.parse_arguments([str(tmp_path / "run.yaml")])
    assert (options.train_files, options.teacher_layer) == (["a.txt"], -2)
    assert (args.mixed_precision, args.learning_rate, args.report_to) == ("no", 5e-4, ["wandb"])
    assert args.cross_documents


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("max_steps: 5.5", "--max_steps.*: invalid int value: '5.5'"),
        ("max_steps: null", "max_steps: 'null' is not a value. Allowed: a number, a word, or a list of these."),
        ("output_dir: ~", "output_dir: '~' is not a value"),
        ("output_dir:", "output_dir: '' is not a value"),
        ("report_to: []", "report_to: [] is not a value"),
        ("train_files: {a: b}", "train_files: {'a': 'b'} is not a value"),
        ("max_steps: .inf", "--max_steps.*: invalid int value: '.inf'"),
        ("learning_rate: .inf", "--learning_rate.*: invalid float value: '.inf'"),
        ("learning_rate: inf", "learning_rate=inf must be a finite number above 0."),
        ("weight_decay: nan", "weight_decay=nan must be a finite number at least 0."),
        ("learning_rate: fast", "--learning_rate.*: invalid float value: 'fast'"),
        ("streaming: 3", "--streaming.*: Truthy value expected: got 3"),
        ("calibration_tokens: -1", "calibration_tokens=-1 must be an integer of at least 0"),
        ("bottlenecks: both", "bottlenecks='both' is unknown. Allowed: 'shared', 'by_width'."),
        ("mixed_precision: fp8", "mixed_precision='fp8' is unknown. Allowed: 'no', 'bf16', 'fp16'."),
        ("report_to: paper", "report_to='paper' is unknown. Allowed: "),
        ("pooling: max", "pooling='max' is unknown. Allowed: 'mean', 'cls'."),
        ("head_slicing: both", "head_slicing='both' is unknown. Allowed: 'prefix', 'per_head'."),
        ("validation_split_percentage: 100", "validation_split_percentage=100.0 must be a finite number above 0"),
        ("max_eval_samples: 0", "max_eval_samples=0 must be an integer of at least 1."),
        ("preprocessing_num_workers: 0", "preprocessing_num_workers=0 must be an integer of at least 1."),
        ("head_steps: -1", "head_steps=-1 must be an integer of at least 0."),
        ("learning_rte: 1", r"unknown option\(s\) learning_rte. Allowed: .*learning_rate"),
        ("max_steps: [1", "run.yaml is not YAML"),
        ("- max_steps", "run.yaml must have one option per line"),
    ],
)
def test_wrong_value_in_yaml_is_refused(script, tmp_path, capsys, line, message):
    file = tmp_path / "run.yaml"
    file.write_text(f"{line}\n")
    required = ["--model_name_or_path=b", "--train_files=a.txt", "--output_dir=o"]
    wanted = re.sub(r"([\[\]{}])", r"\\\1", message)
    assert re.search(wanted, refusal(capsys, script.parse_arguments, [str(file), *required]))


def test_missing_yaml_is_named(script, tmp_path, capsys):
    message = refusal(capsys, script.parse_arguments, [str(tmp_path / "absent.yaml")])
    assert f"No such file or directory: '{tmp_path / 'absent.yaml'}'" in message


def test_example_yaml_is_complete(script):
    options, args = script.parse_arguments([str(EXAMPLES / "run.yaml")])
    given = yaml.load((EXAMPLES / "run.yaml").read_text(), yaml.BaseLoader)
    values = vars(options) | vars(args)
    assert {name for name in given if values[name] in (None, [], "")} == set()
    assert (args.learning_rate, args.report_to, options.validation_files) == (1e-4, ["tensorboard"], ["validation.txt"])


def test_every_option_has_help(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["--help"])
    printed = capsys.readouterr().out
    assert "--match_compute" in printed
    assert "== SUPPRESS ==" not in printed
    fields = script.fields(script.ScriptArguments)
    assert [field.name for field in fields if not field.metadata.get("help", "").endswith(".")] == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--streaming", "--calibration_tokens=9"], "--calibration_tokens are taken from stored text: leave out --str"),
        (["--teacher=t"], "--teacher and a --teacher_weight above 0 need each other."),
        (["--teacher_weight=1"], "--teacher and a --teacher_weight above 0 need each other."),
        (
            ["--state_weight=1"],
            "it may be --state_weight, --pooled_weight or --first_token_weight.",
        ),
        (["--pooled_weight=1"], "--teacher and a --teacher_weight above 0 need each other."),
        (["--mlm_probability=0", *WITHOUT_LABELS, "--head_steps=1"], "--head_steps needs labels"),
        (["--mlm_probability=0"], "mlm_probability=0.0 labels nothing"),
        (["--unknown=1"], "unknown"),
        (["other.yaml"], "other.yaml"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(script, capsys, argv, message):
    assert message in refusal(capsys, parse, script, *argv)


@pytest.mark.parametrize("missing", ["model_name_or_path", "train_files", "output_dir"])
def test_missing_option_is_named(script, capsys, missing):
    given = [f"--{name}=x" for name in REQUIRED if name != missing]
    assert f"--{missing} is missing" in refusal(capsys, script.parse_arguments, given)


# Runs


def test_sentence_encoder_stays_one(run, bert, tokenizer):
    """The pooling of the model that was given reaches all models of the run, also when it is resumed or continued."""
    files = sentence_encoder_files(SuperShaperConfig(), tokenizer, "cls", normalize=True, max_seq_length=9)
    write_files(bert, files)
    expected = {"pooling": "cls", "normalize": True, "max_seq_length": 9}
    _, folder = run(bert, "--eval_steps=1", "--max_steps=1")
    assert read_sentence_encoder(folder / "last") == expected
    run(bert, "--eval_steps=1", "--max_steps=2")
    assert summary(folder)["step"] == 2
    assert read_sentence_encoder(folder / "last") == read_sentence_encoder(folder / "best") == expected
    _, second = run(folder / "last", "--pooling=mean", output="second")
    assert read_sentence_encoder(second / "last") == expected | {"pooling": "mean"}


def test_any_model_can_become_a_sentence_encoder(run, bert):
    _, plain = run(bert)
    assert read_sentence_encoder(plain / "last") == {}
    _, encoder = run(bert, "--pooling=mean", output="second")
    assert read_sentence_encoder(encoder / "last") == {"pooling": "mean", "normalize": False, "max_seq_length": 24}


def test_supernet_of_a_bert_is_trained_and_saved(run, bert):
    printed, folder = run(bert, "--width_choices", "8", "48", "--head_slicing=per_head")
    assert printed.endswith(f"finished after step 2: {folder}\n")
    supernet = AutoModelForMaskedLM.from_pretrained(folder / "last")
    assert supernet.config.width_choices == [8, 48]
    assert supernet.config.head_slicing == "per_head"
    assert summary(folder)["evaluation"].keys() >= {"largest", "smallest"}


def test_finished_run_is_not_trained_again(run, bert):
    _, folder = run(bert)
    before, records = weights(folder), (folder / "metrics.jsonl").read_text()
    run(bert)
    assert_same(weights(folder), before, atol=0)
    assert (folder / "metrics.jsonl").read_text() == records


def test_supernet_goes_on_with_its_bottlenecks(run, bert):
    _, first = run(bert)
    _, second = run(first / "last", "--learning_rate=1e-12", output="second")
    assert_same(weights(second), weights(first), atol=1e-6)
    bottleneck = weights(second)["bert.encoder.input_bottleneck.0.weight"]
    assert not torch.equal(bottleneck, torch.eye(len(bottleneck)))


@pytest.fixture
def subnet(tokenizer, tmp_path):
    folder = tmp_path / "subnet"
    tiny_model(vocab_size=len(tokenizer)).extract_subnet([8, 0, 36]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_subnet_goes_on_with_its_shape(run, subnet):
    _, folder = run(subnet, "--sampling=fixed")
    assert AutoModelForMaskedLM.from_pretrained(folder / "last").config.hidden_sizes == [8, 36]
    assert list(summary(folder)["evaluation"]) == ["model"]


def test_files_of_the_models_may_change_while_the_text_is_read(script, subnet):
    options = [f"--model_name_or_path={subnet}", f"--teacher={subnet}", "--teacher_weight=1"]
    model, _, teacher = script.load_models(
        *script.parse_arguments([*options, "--train_files=a", "--output_dir=o", "--sampling=fixed"])
    )
    before = [{name: tensor.clone() for name, tensor in each.state_dict().items()} for each in (model, teacher.model)]
    file = subnet / "model.safetensors"
    with file.open("r+b") as stream:
        stream.write(bytes(file.stat().st_size))
    assert_same([model.state_dict(), teacher.model.state_dict()], before, atol=0)


def test_subnet_needs_fixed_sampling(run, subnet):
    with pytest.raises(ValueError, match="is a subnet, which has one shape only: add --sampling fixed"):
        run(subnet)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--width_choices", "8", "48"], "--width_choices"),
        (["--head_slicing=prefix"], "--head_slicing"),
        (["--head_slicing=prefix", "--width_choices", "8"], "--width_choices and --head_slicing"),
        (["--calibration_tokens=9", "--bottlenecks=by_width"], "--bottlenecks and --calibration_tokens"),
    ],
)
def test_what_a_supernet_was_made_with_cannot_be_chosen_again(run, subnet, flags, named):
    with pytest.raises(ValueError, match=f"^{named} can be chosen when a supernet is made of a BERT, but "):
        run(subnet, "--sampling=fixed", *flags)


@pytest.mark.parametrize("name", ["outputs/supernet", "outputs/supernet/last", "supernet", "./supernet", "a b/c"])
def test_folder_that_is_not_here_is_named(run, bert, name):
    with pytest.raises(FileNotFoundError, match=f"^--model_name_or_path {name}: there is no such folder here, and no "):
        run(name)
    with pytest.raises(FileNotFoundError, match=f"^--tokenizer_name {name}: there is no such folder here, and no "):
        run(bert, f"--tokenizer_name={name}")
    with pytest.raises(FileNotFoundError, match=f"^--teacher {name}: there is no such folder here, and no such model"):
        run(bert, f"--teacher={name}", "--teacher_weight=1")


@pytest.mark.parametrize(
    ("model", "message"),
    [("bert", "The tokenizer has special tokens only"), ("subnet", "subnet has no tokenizer that can be loaded. Name")],
)
def test_model_without_a_tokenizer_is_refused(run, request, model, message):
    """For a BERT, transformers makes a tokenizer to which every word is unknown."""
    folder = request.getfixturevalue(model)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises((OSError, ValueError), match=message):
        run(folder, "--sampling=fixed")


def test_text_that_is_not_here_is_named(run, bert, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"Text file {tmp_path / 'absent.txt'} does not exist"):
        run(bert, f"--train_files={tmp_path / 'absent.txt'}")


def test_baseline_of_equal_compute(run, bert):
    _, first = run(bert)
    arguments = ("--sampling=fixed", "--shape", "8", "8", "8", "--match_compute")
    _, second = run(bert, *arguments, first / "training_summary.json", output="second")
    assert summary(second)["step"] > 2
    assert summary(second)["flops"] == pytest.approx(summary(first)["flops"], rel=0.15)


SUMMARY = {"padded_tokens": 96, "sequences": 8, "labelled": 12, "flops": 1e9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"padded_tokens": 96', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "is not the training_summary.json of a run that has trained: it needs numbers above 0 for padded_tok"),
        *[
            (json.dumps(SUMMARY | {name: value}), "is not the training_summary.json of a run that has trained")
            for name in SUMMARY
            for value in (0, -1, "7", None, True, [1])
        ],
        (json.dumps({"flops": 1e9}), "is not the training_summary.json of a run that has trained"),
    ],
    ids=lambda value: value[:30],
)
def test_damaged_summary_is_refused(script, tmp_path, text, message):
    (tmp_path / "summary.json").write_text(text)
    _, args = parse(script)
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / 'summary.json'))} {message}"):
        script.match_compute(str(tmp_path / "summary.json"), tiny_model().config, args, 1)


def test_compute_of_any_size_is_at_least_one_step(script, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY | {"flops": 1}))
    _, args = parse(script)
    assert script.match_compute(str(tmp_path / "summary.json"), tiny_model().config, args, 1) == 1


def test_streaming_trains_without_storing_the_text(run, bert, text):
    _, folder = run(bert, "--streaming", f"--validation_files={text}", "--max_eval_samples=5")
    assert summary(folder)["sequences"] == 8
    assert "largest" in summary(folder)["evaluation"]


def test_outside_teacher(run, bert):
    _, folder = run(bert, "--teacher", bert, "--teacher_weight=1")
    assert summary(folder)["arguments"]["teacher_weight"] == 1.0


@pytest.mark.parametrize("folder", ["bert", "headless"])
def test_the_bert_itself_teaches_without_labels(run, request, folder):
    """A masked-LM head is kept where there is one. It is not trained."""
    source = request.getfixturevalue(folder)
    options = ["--mlm_probability=0", "--state_weight=1", "--pooled_weight=1", "--sampling=smallest", "--no_dropout"]
    printed, output = run(source, "--teacher", source, *options, "--learning_rate=1e-3")
    assert re.search(r"shape +distance +cosine\n", printed)
    config = AutoConfig.from_pretrained(output / "last")
    assert config.architectures == ["SuperShaperForMaskedLM" if folder == "bert" else "SuperShaperModel"]
    assert config.hidden_dropout_prob == 0.1
    run(output / "last", "--teacher", source, *options, output="second")
    assert AutoConfig.from_pretrained(tmp := output.parent / "second" / "last").architectures == config.architectures
    if folder == "bert":
        head = "cls.predictions.transform.dense.weight"
        assert torch.equal(load_file(tmp / "model.safetensors")[head], load_file(source / "model.safetensors")[head])


# Preparing a model: its head, its calibration


def test_supernet_is_calibrated_on_unmasked_text_of_the_run(run, script, bert, monkeypatch):
    seen, calibrate = [], script.calibrate

    def keep(model, batches, progress):
        seen.extend(batches)
        calibrate(model, batches, progress)

    monkeypatch.setattr(script, "calibrate", keep)
    _, folder = run(bert, "--calibration_tokens=100", "--bottlenecks=by_width", "--learning_rate=1e-12")
    lengths = [batch["attention_mask"].sum(dim=1).tolist() for batch in seen]
    assert 100 <= sum(map(sum, lengths)) < 112  # a sequence has 12 tokens at most
    assert {len(batch) for batch in lengths[:-1]} == {4}
    tokenizer = AutoTokenizer.from_pretrained(bert)
    for batch in seen:
        assert tokenizer.mask_token_id not in batch["input_ids"]
        assert torch.equal(batch["input_ids"] == tokenizer.pad_token_id, batch["attention_mask"] == 0)
    supernet = AutoModelForMaskedLM.from_pretrained(folder / "last")
    assert supernet.config.head_slicing == "per_head"
    assert supernet.config.full_head_scale
    assert supernet.bert.encoder.narrow(0, supernet.config.width_choices[0]).attention_code.reader.weight.any()
    inputs = tokenizer("the cat sat on the mat .", return_tensors="pt")
    with torch.no_grad():
        assert_same(supernet(**inputs).logits, AutoModelForMaskedLM.from_pretrained(bert)(**inputs).logits, atol=1e-4)


def test_supernet_starts_as_in_the_paper_by_default(run, bert):
    _, folder = run(bert)
    config = AutoModelForMaskedLM.from_pretrained(folder / "last").config
    assert (config.head_slicing, config.bottlenecks, config.full_head_scale) == ("prefix", "shared", False)


def test_calibration_leaves_the_chosen_slicing(run, bert):
    _, folder = run(bert, "--calibration_tokens=100", "--head_slicing=prefix")
    config = AutoModelForMaskedLM.from_pretrained(folder / "last").config
    assert (config.head_slicing, config.full_head_scale) == ("prefix", False)


@pytest.fixture
def phases(script, monkeypatch):
    """Keep the description and the trained parameters of each training; `stop` names one that ends as interrupted."""
    super_pretrain, seen = script.super_pretrain, SimpleNamespace(runs=[], stop=None)

    def record(model, *args, description="Super pre-training", **kwargs):
        seen.runs.append((description, {name for name, p in model.named_parameters() if p.requires_grad}))
        summary = super_pretrain(model, *args, description=description, **kwargs)
        if description == seen.stop:
            summary.status = "interrupted"
        return summary

    monkeypatch.setattr(script, "super_pretrain", record)
    return seen


def test_missing_head_is_trained_first_with_the_encoder_frozen(run, headless, phases):
    run(headless, "--head_steps=1")
    (first, trained), (_, all_of_it) = phases.runs
    assert first == "Head only"
    assert trained == {name for name in all_of_it if name.startswith("cls.") and "decoder.weight" not in name}


def test_interrupted_head_ends_the_run_and_the_next_one_starts_anew(run, headless, phases):
    """The result is that of a run that was never interrupted, though the head starts from random weights."""
    phases.stop = "Head only"
    printed, folder = run(headless, "--head_steps=2", *CALIBRATION)
    assert [description for description, _ in phases.runs] == ["Head only"]
    assert "Interrupted while the head was trained, before the first checkpoint." in printed
    assert not (folder / "last").exists()
    phases.stop = None
    torch.manual_seed(1)
    run(headless, "--head_steps=2", *CALIBRATION)
    torch.manual_seed(2)
    _, uninterrupted = run(headless, "--head_steps=2", *CALIBRATION, output="uninterrupted")
    assert_same(weights(folder), weights(uninterrupted), atol=0)


def test_run_with_a_checkpoint_is_not_prepared_again(run, headless, phases):
    _, folder = run(headless, "--head_steps=2", *CALIBRATION)
    before = weights(folder)
    phases.runs.clear()
    run(headless, "--head_steps=2", *CALIBRATION)
    assert [description for description, _ in phases.runs] == ["Super pre-training"]
    assert_same(weights(folder), before, atol=0)
    assert AutoModelForMaskedLM.from_pretrained(folder / "last").config.full_head_scale


def test_head_of_a_run_has_the_same_weights_on_every_process(script, headless):
    """Each process loads the model for itself, and the checkpoint has no head."""
    options, args = script.parse_arguments([f"--model_name_or_path={headless}", "--train_files=a", "--output_dir=o"])
    torch.manual_seed(1)
    first, *_ = script.load_models(options, args)
    torch.manual_seed(2)
    second, *_ = script.load_models(options, args)
    assert_same(first.state_dict(), second.state_dict(), atol=0)


# Several processes, the launcher, the Hub


def test_main_process_acts_first_and_once():
    acts = []
    for is_main, expected in ((True, [1]), (False, [1, 2])):
        process = SimpleNamespace(num_processes=2, is_main_process=is_main)
        assert main_process_first(lambda: acts.append(0) or len(acts), process) == expected[-1]
        assert len(acts) == len(expected)


@pytest.mark.parametrize("error", [MemoryError("no memory"), ValueError("damaged"), RuntimeError("other")])
def test_error_of_the_main_process_reaches_the_others(script, monkeypatch, error):
    """Otherwise they would wait for it for ever."""

    def fail(*args):
        raise error

    monkeypatch.setattr("supershaper_hf.processes.broadcast_object_list", lambda outcome: [None, error])
    with pytest.raises(type(error), match=str(error)):
        main_process_first(lambda: None, SimpleNamespace(num_processes=2, is_main_process=False))
    with pytest.raises(type(error), match=str(error)):
        main_process_first(fail, SimpleNamespace(num_processes=2, is_main_process=True))


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, about an upload of huggingface_hub
def test_last_model_is_published(run, bert, monkeypatch):
    with HubServer() as server:
        server.tokens |= {"hf_writer": "lab"}
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        run(bert, "--push_to_hub=lab/supernet")
        card = server.repos["lab/supernet"].files()["README.md"].decode()
        huggingface_hub.close_session()
    assert 'from_pretrained("lab/supernet"' in card
    assert "Masked language modelling, the largest shape, the smallest and 1 random one(s) per step." in card


def test_accelerate_launches_it(bert, text, tmp_path, capfd):
    """The launcher runs in this process, the script in one that it starts."""
    flags = [f"--model_name_or_path={bert}", *STEPS, f"--train_files={text}", f"--output_dir={tmp_path / 'output'}"]
    arguments = ["--cpu", "--num_processes=1", str(SCRIPT), *flags]
    launch.launch_command(launch.launch_command_parser().parse_args(arguments))  # raises if the script fails
    assert "finished after step 2" in capfd.readouterr().out
