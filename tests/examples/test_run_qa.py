"""`examples/run_qa.py` on questions about the addresses: a supernet with a shape, then the folder it has written."""

import json
import re

import pytest
from test_run_ner import EXAMPLES, load, paragraphs, supernet, tasks  # noqa: F401
from transformers import AutoModelForQuestionAnswering


QA = EXAMPLES / "run_qa.py"


@pytest.fixture
def run(tasks, paragraphs, tmp_path, capsys):  # noqa: F811
    """Run the script on questions about 5 paragraphs, and score those about 3; return what it prints."""
    for name, part, count in (("train", paragraphs[:200], 5), ("validation", paragraphs[200:], 3)):
        tasks.write_squad(tmp_path / f"{name}.json", part, count)

    def run(*options):
        files = [f"--{name}_file={tmp_path / name}.json" for name in ("train", "validation")]
        small = ["--max_length=24", "--num_train_epochs=2", "--learning_rate=5e-3", "--use_cpu", "--disable_tqdm=True"]
        assert load(QA).main([*files, *small, "--stride=4", *options]) == 0
        return capsys.readouterr().out

    return run


def test_supernet_then_subnet(run, supernet, tmp_path):  # noqa: F811
    """The subnet that the script writes is loaded by the Auto class, and goes on learning."""
    printed = run(f"--model={supernet}", "--shape", "36", "20", "48", f"--output_dir={tmp_path / 'out'}")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert "shape [36, 20, 48], seeds [0], model of seed 0" in printed
    scores = results["mean"]["validation"]
    assert scores.keys() >= {"exact", "f1", "HasAns_f1", "NoAns_f1", "best_f1", "best_f1_thresh"}
    assert scores["total"] == 9
    assert f"{scores['f1']:.4f}" in printed
    folder = tmp_path / "out" / "model"
    model = AutoModelForQuestionAnswering.from_pretrained(folder)
    assert (model.config.hidden_sizes, model.config.num_labels) == ([36, 20, 48], 2)
    card = (folder / "README.md").read_text()
    assert re.search(r"Fine-tuned on the task qa \(\d+ windows\) .* batches of \d+ windows on each process", card)
    assert "pipeline(" not in card  # transformers has none for questions any more

    run(f"--model={folder}", f"--output_dir={tmp_path / 'second'}", "--num_train_epochs=1")
    second = json.loads((tmp_path / "second" / "results.json").read_text())
    assert second["shape"] == [36, 20, 48]
    assert second["mean"]["validation"]["total"] == 9


def test_version_1_and_wrong_stride(run, supernet, tmp_path):  # noqa: F811
    """Questions that all have an answer have the scores of version 1."""
    for name in ("train", "validation"):
        file = tmp_path / f"{name}.json"
        content = json.loads(file.read_text())
        for paragraph in content["data"][0]["paragraphs"]:
            paragraph["qas"] = [question for question in paragraph["qas"] if question["answers"]]
        file.write_text(json.dumps(content))
    options = [f"--model={supernet}", "--shape", "36", "20", "48"]
    printed = run(*options, f"--output_dir={tmp_path / 'out'}")
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["mean"]["validation"]
    assert scores.keys() == {"exact_match", "f1"}
    assert "exact_match" in printed
    with pytest.raises(ValueError, match="stride=20 must be less than 15: of max_length=24, 6 are for the question"):
        run(*options, f"--output_dir={tmp_path / 'second'}", "--stride=20")


@pytest.mark.filterwarnings("ignore:Shapes left out of the fit")  # of a model of a few steps
def test_all_shapes_are_ready_after_a_sandwich(run, supernet, tmp_path):  # noqa: F811
    printed = run(f"--model={supernet}", "--sandwich", "--num_shapes=8", f"--output_dir={tmp_path / 'out'}")
    scores = re.findall(r"^(?:rectangle|front|random).*?  +[\d,]+  +([\d.]+)  +[\d.]+  +\[", printed, re.MULTILINE)
    assert len(scores) >= 8
    assert len(set(scores)) > 1
