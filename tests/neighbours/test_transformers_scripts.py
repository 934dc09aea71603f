"""The scripts of the transformers repository, untouched, on a subnet and on a supernet: they train, score and save.

transformers is installed without them. Give their folder in a checkout of its repository:

    TRANSFORMERS_EXAMPLES=transformers/examples/pytorch make test-neighbours

Each script runs once in an environment that imports this package, and once in one that cannot import it, with
`--trust_remote_code`. The metrics that the scripts fetch from the Hub are taken from the folder `metrics` instead.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from conftest import SPECIAL_TOKENS, WORDS, tiny_batch, tiny_model
from launching import ENVIRONMENT, free_port
from safetensors.torch import load_file
from tiny_tasks import examples, write_bert, write_csv
from transformers import AutoModelForSequenceClassification, BertTokenizer

from supershaper_hf import SuperShaperForSequenceClassification, save_for_hub


EXAMPLES = Path(os.environ.get("TRANSFORMERS_EXAMPLES", "")).resolve()
METRICS = Path(__file__).with_name("metrics")
SHAPE = [8, 20, 36]

pytestmark = pytest.mark.skipif(
    not os.environ.get("TRANSFORMERS_EXAMPLES"),
    reason="set TRANSFORMERS_EXAMPLES to the folder examples/pytorch of a checkout of the transformers repository",
)

# run_mlm_no_trainer.py asks for a name that accelerate has dropped: it ends here without these lines, also with a BERT.
TPU = """
from accelerate import DistributedType

DistributedType.TPU = DistributedType.XLA
"""
# Python imports a file of the name sitecustomize.py when it starts.
SITECUSTOMIZE = {
    "imported": "import supershaper_hf\n",
    "absent": """
import sys


class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "supershaper_hf":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocker())
""",
}
# Import once what every script imports, then run each script in a child: 4 seconds of a core instead of 9.
SERVER = """
import json
import os
import runpy
import sys

import accelerate, datasets, evaluate, transformers.trainer

for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = job["command"]
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    exec(job["before"])
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()
"""

TRAINER = ["--do_train", "--do_eval", "--max_steps=2", "--use_cpu", "--report_to=none", "--disable_tqdm=True"]
TRAINER += ["--save_strategy=no"]
NO_TRAINER = ["--max_train_steps=2"]
BOTH = ["--per_device_train_batch_size=4", "--learning_rate=1e-3", "--seed=1"]
WINDOWS = ["--max_seq_length=16", "--doc_stride=2"]


class Script(NamedTuple):
    file: str
    auto_class: str
    data: str
    options: list
    scores: set


SCRIPTS = [
    Script(
        "text-classification/run_glue.py",
        "AutoModelForSequenceClassification",
        "glue.csv",
        [*TRAINER, "--max_seq_length=12"],
        {"eval_accuracy", "eval_loss", "train_loss"},
    ),
    Script(
        "text-classification/run_glue_no_trainer.py",
        "AutoModelForSequenceClassification",
        "glue.csv",
        [*NO_TRAINER, "--max_length=12"],
        {"eval_accuracy"},
    ),
    Script(
        "language-modeling/run_mlm.py",
        "AutoModelForMaskedLM",
        "mlm.txt",
        [*TRAINER, "--line_by_line", "--mlm_probability=0.3"],
        {"perplexity", "eval_accuracy", "eval_loss", "train_loss"},
    ),
    Script(
        "language-modeling/run_mlm_no_trainer.py",
        "AutoModelForMaskedLM",
        "mlm.txt",
        [*NO_TRAINER, "--max_seq_length=12", "--mlm_probability=0.3"],
        {"perplexity"},
    ),
    Script(
        "token-classification/run_ner.py",
        "AutoModelForTokenClassification",
        "ner.json",
        [*TRAINER, "--max_seq_length=16"],
        {"eval_precision", "eval_recall", "eval_f1", "eval_accuracy", "eval_loss", "train_loss"},
    ),
    Script(
        "token-classification/run_ner_no_trainer.py",
        "AutoModelForTokenClassification",
        "ner.json",
        [*NO_TRAINER, "--max_length=16"],
        {"eval_precision", "eval_recall", "eval_f1", "eval_accuracy"},
    ),
    Script(
        "question-answering/run_qa.py",
        "AutoModelForQuestionAnswering",
        "qa.json",
        [*TRAINER, *WINDOWS],
        {"eval_exact_match", "train_loss"},
    ),
    Script(
        "question-answering/run_qa_no_trainer.py",
        "AutoModelForQuestionAnswering",
        "qa.json",
        [*NO_TRAINER, *WINDOWS],
        {"eval_exact_match"},
    ),
]
GLUE, GLUE_NO_TRAINER = SCRIPTS[:2]


def write_data(folder):
    """Write `train` and `validation` in the format of each script: CSV, lines of text, JSON lines, SQuAD."""
    for seed, (name, count) in enumerate({"train": 8, "validation": 5}.items()):
        rows = examples(count, seed)
        write_csv(folder / f"{name}-glue.csv", rows)
        sentences = [row["sentence"] for row in rows]
        (folder / f"{name}-mlm.txt").write_text("\n".join(sentences * 4))
        words = [sentence.split() for sentence in sentences]
        labels = {"cat": "B-ANIMAL", "dog": "B-ANIMAL", "mat": "B-PLACE", "moon": "B-PLACE"}
        tagged = [{"tokens": line, "ner_tags": [labels.get(word, "O") for word in line]} for line in words]
        (folder / f"{name}-ner.json").write_text("\n".join(map(json.dumps, tagged)))
        (folder / f"{name}-qa.json").write_text(json.dumps({"data": list(map(question, range(count), words))}))


def question(number, words):
    """A question whose answer is the only noun of a context that is longer than a window."""
    context = " ".join(["the", "cat", "was", "under", *words, *["and", "the", "big", "moon"] * 3])
    answers = {"text": ["cat"], "answer_start": [context.index("cat")]}
    return {"id": str(number), "context": context, "question": "was the big dog", "answers": answers}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data, the metrics, a subnet, supernets, and the two environments."""
    folder = tmp_path_factory.mktemp("scripts")
    write_data(folder)
    shutil.copytree(METRICS, folder, dirs_exist_ok=True)
    vocab = {word: index for index, word in enumerate(SPECIAL_TOKENS + WORDS)}
    tokenizer = BertTokenizer(vocab=vocab, model_max_length=24)
    supernet = tiny_model(vocab_size=len(tokenizer))
    save_for_hub(supernet, folder / "supernet", tokenizer=tokenizer)
    save_for_hub(supernet.extract_subnet(SHAPE), folder / "subnet", tokenizer=tokenizer)
    by_width = tiny_model(vocab_size=len(tokenizer), bottlenecks="by_width")
    save_for_hub(by_width, folder / "supernet-by_width", tokenizer=tokenizer)
    for name, text in SITECUSTOMIZE.items():
        (folder / name).mkdir()
        (folder / name / "sitecustomize.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def servers(home):
    """One process for each environment, which runs scripts in children."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", SERVER]
    started = {
        name: subprocess.Popen(command, cwd=home, env=environment(home, name), **pipes) for name in SITECUSTOMIZE
    }
    yield started
    for server in started.values():
        server.communicate()


def environment(home, package):
    return ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(home / package), ENVIRONMENT["PYTHONPATH"]])}


def command_line(home, script, model, package, output):
    files = [f"--{part}_file={home / f'{part}-{script.data}'}" for part in ("train", "validation")]
    # An option with a value in run_glue_no_trainer.py, without one in the others, either in those with Trainer.
    flag = "--trust_remote_code=True" if "glue" in script.file else "--trust_remote_code"
    trust = [flag] if package == "absent" else []
    arguments = [f"--model_name_or_path={model}", f"--output_dir={output}", *files, *trust]
    return [str(EXAMPLES / script.file), *arguments, *script.options, *BOTH]


def run(server, command, output, before=""):
    """Run a script in a child of the server; return the scores that it has written."""
    log = output.with_suffix(".log")
    server.stdin.write(json.dumps({"command": command, "log": str(log), "before": before}) + "\n")
    server.stdin.flush()
    code = server.stdout.readline().strip()
    assert code == "0", log.read_text()[-6000:]
    return json.loads((output / "all_results.json").read_text())


def assert_trained(script, model, output, scores):
    """The scores are there, the folder holds a model of the same shape that has learned, and its code."""
    assert scores.keys() >= script.scores
    assert all(0 <= scores[name] < 1000 for name in script.scores)
    config = json.loads((model / "config.json").read_text())
    trained = getattr(transformers, script.auto_class).from_pretrained(output)
    assert type(trained).__name__ == script.auto_class.replace("AutoModel", "SuperShaper")
    assert trained.config.hidden_sizes == config["hidden_sizes"]
    assert trained.config.bottlenecks == config["bottlenecks"]
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert before[name].shape == after[name].shape
    assert not torch.equal(before[name], after[name])
    assert {file.name for file in model.glob("*.py")} == {file.name for file in output.glob("*.py")} != set()
    with torch.no_grad():
        outputs = trained(**{key: value % 20 for key, value in tiny_batch().items()})
    assert all(values.isfinite().all() for values in outputs.to_tuple())


@pytest.mark.parametrize("package", SITECUSTOMIZE)
@pytest.mark.parametrize("kind", ["subnet", "supernet"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: Path(script.file).stem)
def test_script_trains_scores_and_saves(home, servers, script, kind, package, tmp_path):
    command = command_line(home, script, home / kind, package, tmp_path / "out")
    before = TPU if "mlm_no_trainer" in script.file else ""
    scores = run(servers[package], command, tmp_path / "out", before)
    assert_trained(script, home / kind, tmp_path / "out", scores)


@pytest.mark.parametrize("package", SITECUSTOMIZE)
@pytest.mark.parametrize("kind", ["subnet", "supernet"])
def test_trained_folder_is_scored_again_alike(home, servers, kind, package, tmp_path):
    """What a script has saved is loaded by the script, and is the model that it has scored."""
    command = command_line(home, GLUE, home / kind, package, tmp_path / "out")
    scores = run(servers[package], command, tmp_path / "out")
    command = command_line(home, GLUE, tmp_path / "out", package, tmp_path / "again")
    command.remove("--do_train")
    again = run(servers[package], command, tmp_path / "again")
    assert again["eval_loss"] == pytest.approx(scores["eval_loss"], abs=1e-6)


def test_run_mlm_no_trainer_ends_with_this_accelerate_whatever_the_model(home, servers, tmp_path):
    script = next(script for script in SCRIPTS if "mlm_no_trainer" in script.file)
    model = write_bert(tmp_path / "bert", BertTokenizer.from_pretrained(home / "subnet"))
    with pytest.raises(AssertionError, match="AttributeError: TPU"):
        run(servers["imported"], command_line(home, script, model, "imported", tmp_path / "out"), tmp_path / "out")


@pytest.mark.parametrize("package", SITECUSTOMIZE)
def test_other_labels_and_a_model_from_scratch(home, servers, package, tmp_path):
    """The options `ignore_mismatched_sizes` of run_glue.py and `config_name` of run_mlm_no_trainer.py."""
    tokenizer = BertTokenizer.from_pretrained(home / "subnet")
    labels = tiny_model(SuperShaperForSequenceClassification, vocab_size=len(tokenizer), num_labels=3)
    save_for_hub(labels, tmp_path / "labels", tokenizer=tokenizer)
    command = command_line(home, GLUE, tmp_path / "labels", package, tmp_path / "out")
    scores = run(servers[package], [*command, "--ignore_mismatched_sizes"], tmp_path / "out")
    assert_trained(GLUE, tmp_path / "labels", tmp_path / "out", scores)
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2

    script = next(script for script in SCRIPTS if "mlm_no_trainer" in script.file)
    model, output = home / "supernet", tmp_path / "scratch"
    command = command_line(home, script, model, package, output)
    command.remove(f"--model_name_or_path={model}")
    options = [f"--config_name={model}", f"--tokenizer_name={model}"]
    assert_trained(script, model, output, run(servers[package], [*command, *options], output, TPU))


def launch(home, script, kind, package, output):
    """Run a script on two processes; return the process."""
    options = ["--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}"]
    command = command_line(home, script, home / kind, package, output)
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, *command]
    return subprocess.run(command, cwd=home, env=environment(home, package), capture_output=True, text=True)


@pytest.mark.parametrize(
    ("script", "kind", "package"),
    [
        (GLUE, "subnet", "imported"),
        (GLUE, "supernet-by_width", "absent"),
        (GLUE_NO_TRAINER, "subnet", "absent"),
        (GLUE_NO_TRAINER, "supernet", "imported"),
        (GLUE_NO_TRAINER, "supernet", "absent"),
    ],
    ids=lambda value: Path(value.file).stem if isinstance(value, Script) else value,
)
def test_script_on_two_processes(home, script, kind, package, tmp_path):
    output = tmp_path / "out"
    process = launch(home, script, kind, package, output)
    assert process.returncode == 0, process.stderr[-6000:]
    assert_trained(script, home / kind, output, json.loads((output / "all_results.json").read_text()))


def test_ddp_without_trainer_refuses_weights_that_the_full_shape_does_not_use(home, tmp_path):
    """The script makes its `Accelerator` without `find_unused_parameters`, and has no option for it."""
    process = launch(home, GLUE_NO_TRAINER, "supernet-by_width", "imported", tmp_path / "out")
    assert process.returncode != 0
    assert "`find_unused_parameters=True`" in process.stderr
