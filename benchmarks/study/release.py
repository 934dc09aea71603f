"""Make the folder of the released supernet out of a trained one: `checkpoints/supershaper-minilm-l6`.

    python -m benchmarks.study.release --data DATA --bert MINILM --trained outputs/family/last

1. The supernet gets the masked-LM head that `head.py` has trained on the frozen encoder of the original.
2. Head and encoder learn together: masked tokens, and as before the last hidden states of the original.
3. Widths that no budget needs are left out, and the weights are rounded to bfloat16.
4. `examples/search_shapes.py` measures shapes on held-out text: records, front, explorer.html and report.
5. The card is written out of these files and of the results of the study.

`outputs/family/last` is what `examples/make_supernet.py` has made; docs/results.md has the commands. What is done is
not done again. After new results of the study, the same command writes the card again.
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from supershaper_hf import (
    SuperPretrainingArguments,
    SuperShaperForMaskedLM,
    load_text,
    read_sentence_encoder,
    save_for_hub,
    super_pretrain,
    tokenize,
)
from supershaper_hf.files import write_folder
from supershaper_hf.publish.__main__ import main as write_card
from supershaper_hf.training.teacher import OutsideTeacher

from .head import MAX_LENGTH, bert_with_head
from .head import STEPS as HEAD_STEPS
from .report import card_table
from .study import held_out_text, make_parser, training_text


ROOT = Path(__file__).parents[2]
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TRAINING = """\
Made of all-MiniLM-L6-v2 by `examples/make_supernet.py`: calibrated in closed form on 50,000 tokens, then trained at
three random shapes in each step, which learn the last hidden states of the original. The text, without labels, are US
presidential addresses, documentation of SQLite, Apache, Python and PostgreSQL, WordNet's glosses, and the first
paragraphs of Wikipedia articles. A masked-LM head was trained on the frozen encoder of the original, then head and
encoder together for {together:,} steps. docs/results.md of the project has the commands and the figures."""
LIMITS = """\
The original was made to embed English sentences: it was distilled, then tuned by contrast on pairs of sentences. So its
token states say little about single words, and the masked-LM head that this supernet has is weak: it makes the
training of the paper possible, not a good `fill-mask`. Texts of more than 128 tokens had no part in the training. A
language model repeats the statistics of its training text, including its biases."""
STEPS = 400
TOGETHER: dict[str, Any] = {
    # The masked-LM loss is several nats, the error of the states below one. Even with these weights 400 steps move the
    # encoder: at width 240 the loss falls from 6.88 to 5.66 nats, and the distance rises from .295 to .330.
    "mlm_probability": 0.15,
    "state_weight": 10.0,
    "pooled_weight": 10.0,
    "first_token_weight": 5.0,
    "sampling": "random",
    "random_shapes": 3,
    "distribution": "budget",
    "no_dropout": True,
    "learning_rate": 2e-4,
    "shared_learning_rate_scale": 0.6,
    "group_by_length": True,
    "per_device_train_batch_size": 32,
    "max_length": MAX_LENGTH,
    "mixed_precision": "bf16",
    "save_steps": 50,
}
WIDTHS = [96, 144, 240, 288, 384]  # with 336 the folder would pass 60 MB; without, its weights have 58.9 MB
SEARCH = {"num_shapes": 300, "max_eval_samples": 200, "num_budgets": 8}


def add_head(args: argparse.Namespace, folder: Path) -> None:
    """Write the supernet with the masked-LM head of the original into `folder`."""
    supernet = SuperShaperForMaskedLM.from_pretrained(args.trained)
    head = SuperShaperForMaskedLM.from_bert(bert_with_head(args))
    supernet.cls.load_state_dict(head.cls.state_dict())
    supernet.tie_weights()  # the decoder is the supernet's own embeddings
    write_folder(folder, supernet.save_pretrained)


def train_together(args: argparse.Namespace, folder: Path) -> Path:
    """Train head and encoder at random shapes; return the folder of the supernet.

    Raises:
        SystemExit: If the training was interrupted. The same command continues.
    """
    output = folder / "together"
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    supernet = SuperShaperForMaskedLM.from_pretrained(folder / "with-head", attn_implementation="eager")
    teacher = OutsideTeacher(AutoModel.from_pretrained(args.bert, attn_implementation="eager"))
    text = tokenize(load_text(training_text(args.data)), tokenizer, MAX_LENGTH)
    options = SuperPretrainingArguments(max_steps=args.steps, output_dir=str(output), pooling="mean", **TOGETHER)
    if super_pretrain(supernet, tokenizer, text, options, teacher=teacher).status == "interrupted":
        raise SystemExit("Interrupted. Start the same command again to continue.")
    return output / "last"


def keep_widths(supernet: SuperShaperForMaskedLM, widths: list[int]) -> SuperShaperForMaskedLM:
    """Return the supernet without the weights of the widths that are not among `widths`."""
    config = copy.deepcopy(supernet.config)
    config.width_choices = widths
    kept = SuperShaperForMaskedLM(config)
    own = kept.state_dict().keys()
    kept.load_state_dict({name: tensor for name, tensor in supernet.state_dict().items() if name in own})
    return kept.eval()


def search(args: argparse.Namespace, folder: Path) -> None:
    """Measure shapes into the folder `search` of the supernet."""
    options = [f"--{name}={value}" for name, value in SEARCH.items()]
    command = [sys.executable, str(ROOT / "examples" / "search_shapes.py"), *options]
    command += ["--model_name_or_path", str(folder), "--original", args.bert, "--output_dir", str(folder / "search")]
    subprocess.run([*command, "--eval_files", held_out_text(args.data)], check=True)
    for name in (".lock", ".records.jsonl.lock", "README.md"):  # the card of a data set of its own
        (folder / "search" / name).unlink(missing_ok=True)


def assemble(args: argparse.Namespace, trained: Path, folder: Path) -> None:
    """Write the released folder: weights, tokenizer, code, and the files of a sentence encoder.

    A masked LM has no pooler. The file holds that of the original all the same, as the files of Google's BERTs do:
    other heads start with it.
    """
    supernet = keep_widths(SuperShaperForMaskedLM.from_pretrained(trained), WIDTHS).to(torch.bfloat16)
    pooler = AutoModel.from_pretrained(args.bert, dtype=torch.bfloat16).pooler.state_dict()
    save_for_hub(
        supernet,
        folder,
        state_dict={**supernet.state_dict(), **{f"bert.pooler.{name}": tensor for name, tensor in pooler.items()}},
        tokenizer=AutoTokenizer.from_pretrained(args.bert),
        license="apache-2.0",
        language="en",
        base_model=BASE_MODEL,
        training=TRAINING.format(together=args.steps),
        limits=LIMITS,
        **read_sentence_encoder(args.bert),
    )


def write_release_card(args: argparse.Namespace, folder: Path, work: Path) -> None:
    """Write the card of the released folder, with the results of the study."""
    file = work / "evaluation.md"
    file.write_text(card_table(args.results), encoding="utf-8")
    write_card([str(folder), f"--evaluation={file}", f"--output={folder / 'README.md'}"])


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trained", required=True, help="folder of the trained supernet")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that train head and encoder together")
    parser.add_argument("--head_steps", type=int, default=HEAD_STEPS, help="training steps of the head alone")
    args = parser.parse_args()
    work, folder = args.output_dir / "release", Path(args.supernet)
    if not folder.exists():
        if not (work / "with-head").exists():
            add_head(args, work / "with-head")
        assemble(args, train_together(args, work), folder)
    search(args, folder)
    write_release_card(args, folder, work)


if __name__ == "__main__":
    main()
