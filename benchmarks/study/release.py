"""Make the folder of the released supernet out of a trained one: `checkpoints/supershaper-minilm-l6`.

    python -m benchmarks.study.release --data DATA --bert MINILM --trained outputs/family/last

1. The supernet gets the masked-LM head that `head.py` has trained on the frozen encoder of the original. Head and
   encoder do not learn together afterwards: `masked_lm.py` has measured what that costs.
2. Widths that no budget needs are left out, and the weights are rounded to bfloat16.
3. `examples/search_shapes.py` measures shapes on held-out text: records, front, explorer.html and report.

`outputs/family/last` is what `examples/make_supernet.py` has made; docs/results.md has the commands. What is done is
not done again. Then `python -m benchmarks.study.report` writes the card.
"""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from supershaper_hf import SuperShaperForMaskedLM, read_sentence_encoder, save_for_hub

from .head import STEPS as HEAD_STEPS
from .head import supernet_with_head
from .study import held_out_text, make_parser


ROOT = Path(__file__).parents[2]
BASE_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TRAINING = """\
Made of all-MiniLM-L6-v2 by `examples/make_supernet.py`: calibrated in closed form on 50,000 tokens, then trained at
three random shapes in each step, which learn the last hidden states of the original. The text, without labels, are US
presidential addresses, documentation of SQLite, Apache, Python and PostgreSQL, WordNet's glosses, and the first
paragraphs of Wikipedia articles: 1,500 and then 4,000 steps, 7.5 million tokens. In the latter the first token of a
sequence counted half as much again. docs/results.md of the project has the commands and the figures."""
LIMITS = """\
The original was made to embed English sentences: it was distilled, then tuned by contrast on pairs of sentences. So its
token states say little about single words. Texts of more than 128 tokens had no part in the training. A language model
repeats the statistics of its training text, including its biases."""
WIDTHS = [96, 144, 240, 288, 384]  # with 336 the folder would pass 60 MB; without, its weights have 58.9 MB
SEARCH = {"num_shapes": 200, "max_eval_samples": 200, "num_budgets": 8}


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
    of_a_data_set = ("README.md", "records.parquet", "front.parquet")  # of a repository of its own
    for name in (".lock", ".records.jsonl.lock", *of_a_data_set):
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
        training=TRAINING,
        limits=LIMITS,
        **read_sentence_encoder(args.bert),
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trained", required=True, help="folder of the trained supernet")
    parser.add_argument("--head_steps", type=int, default=HEAD_STEPS, help="training steps of the head alone")
    args = parser.parse_args()
    folder = Path(args.supernet)
    if not folder.exists():
        assemble(args, supernet_with_head(args), folder)
    search(args, folder)


if __name__ == "__main__":
    main()
