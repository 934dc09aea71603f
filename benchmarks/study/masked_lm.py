"""Question 9: what does the masked-LM head of the released supernet reach, and may the encoder learn with it?

    python -m benchmarks.study.masked_lm --data DATA --bert MINILM --trained outputs/family/last

The head was trained on the frozen encoder of the original (`head.py`). Here head and encoder learn together at random
shapes: masked tokens, and as before the last hidden states of the original. Some rectangles are measured before and
after, on held-out text and on the validation pairs of stsb.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import AutoModel, AutoTokenizer

from supershaper_hf import (
    SuperPretrainingArguments,
    SuperShaperForMaskedLM,
    evaluate_shapes,
    fixed_masks,
    load_text,
    markdown_table,
    super_pretrain,
    tokenize,
)
from supershaper_hf.search.fingerprints import fingerprint_encoder
from supershaper_hf.training.teacher import OutsideTeacher

from ..sentence_similarity import load_pairs, similarity_score
from .head import MAX_LENGTH, supernet_with_head
from .head import STEPS as HEAD_STEPS
from .material import take
from .study import (
    Results,
    command_and_machine,
    held_out_text,
    make_parser,
    read_rows,
    read_settings,
    task_file,
    training_text,
)


QUESTION = "masked_lm"
FROZEN, TOGETHER = "head alone", "head and encoder together"
WIDTHS = (384, 240, 144)
STEPS, TOKENS, BATCH_SIZE = 400, 5000, 32
RECIPE: dict[str, Any] = {
    "mlm_probability": 0.15,  # its loss is several nats, the error of the states below one: hence their weights
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
    "per_device_train_batch_size": BATCH_SIZE,
    "max_length": MAX_LENGTH,
    "mixed_precision": "bf16",
    "save_steps": 50,
}


def train_together(args: argparse.Namespace, start: Path) -> Path:
    """Train head and encoder at random shapes, and return the folder of the supernet.

    Raises:
        SystemExit: If the training was interrupted. The same command continues.
    """
    output = args.output_dir / "release" / "together"
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    supernet = SuperShaperForMaskedLM.from_pretrained(start, attn_implementation="eager")
    teacher = OutsideTeacher(AutoModel.from_pretrained(args.bert, attn_implementation="eager"))
    text = tokenize(load_text(training_text(args.data)), tokenizer, MAX_LENGTH)
    options = SuperPretrainingArguments(max_steps=args.steps, output_dir=str(output), pooling="mean", **RECIPE)
    if super_pretrain(supernet, tokenizer, text, options, teacher=teacher).status == "interrupted":
        raise SystemExit("Interrupted. Start the same command again to continue.")
    return output / "last"


def measure(args: argparse.Namespace, folder: Path, name: str, results: Results) -> None:
    """Add a row for every rectangle of a supernet that has none yet."""
    missing = [width for width in WIDTHS if not results.find(model=name, width=width)]
    if not missing:
        return
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    original = AutoModel.from_pretrained(args.bert).eval()
    supernet = SuperShaperForMaskedLM.from_pretrained(folder).eval()
    text = take(tokenize(load_text([held_out_text(args.data)]), tokenizer, MAX_LENGTH), TOKENS)
    clean = fixed_masks(text, tokenizer, BATCH_SIZE, mlm_probability=0)
    masked = fixed_masks(text, tokenizer, BATCH_SIZE)
    pairs, labels = load_pairs(task_file(args.data, "stsb", "validation"))
    for width in missing:
        shape = [width] * supernet.config.num_hidden_layers
        [states] = evaluate_shapes(supernet, clean, [shape], measure="distance", original=original)
        [tokens] = evaluate_shapes(supernet, masked, [shape])
        figures = {"loss": tokens["loss"], "accuracy": tokens["accuracy"], "distance": states["distance"]}
        figures["sts"] = similarity_score(supernet.base_model, tokenizer, pairs, labels, "mean", shape)
        results.add({"model": name, "width": width, **{key: round(value, 4) for key, value in figures.items()}})


def answer(results_folder: Path, _: Path) -> str:
    """Return the section as Markdown, from what was measured so far; "" if there is no row."""
    rows = read_rows(results_folder, QUESTION)
    if not rows:
        return ""
    table = [
        {
            "trained": row["model"],
            "width of all layers": row["width"],
            "masked-LM loss": f"{row['loss']:.2f}",
            "masked tokens found": f"{row['accuracy']:.1%}",
            "distance": f"{row['distance']:.3f}",
            "STS": f"{100 * row['sts']:.1f}",
        }
        for row in rows
    ]
    get = read_settings(results_folder, QUESTION)
    command = command_and_machine(results_folder, QUESTION, f"{QUESTION} --trained LONGER/last")
    text = [
        f"{command} Together they learn for {get['steps']} steps of {BATCH_SIZE} sequences. The loss is in nats, on "
        f"{get['tokens']:,} tokens of held-out text, 15 % of them masked. The distance is that of the last "
        "hidden states from those of the original.",
        markdown_table(table),
    ]
    return "\n\n".join([*text, verdict(rows)])


def verdict(rows: list[dict[str, Any]]) -> str:
    """Return what training together does to the smaller shapes, and so which of both is released."""
    found = {(row["model"], row["width"]): row for row in rows}
    before, after = (found.get((name, WIDTHS[1])) for name in (FROZEN, TOGETHER))
    if before is None or after is None:
        return ""
    worse = after["sts"] < before["sts"] or after["distance"] > before["distance"]
    return (
        f"At width {WIDTHS[1]} training together changes the loss by {after['loss'] - before['loss']:+.2f} nats, the "
        f"distance by {after['distance'] - before['distance']:+.3f} and STS by "
        f"{100 * (after['sts'] - before['sts']):+.1f} points. "
        + (
            "A supernet of a sentence encoder is used for its states, not for its masked tokens: the released one has "
            "the head alone."
            if worse
            else "It does no harm to the states."
        )
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trained", required=True, help="folder of the trained supernet")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps that train head and encoder together")
    parser.add_argument("--head_steps", type=int, default=HEAD_STEPS, help="training steps of the head alone")
    args = parser.parse_args()
    start = supernet_with_head(args)
    trained = AutoModel.from_pretrained(args.trained)
    settings = {"steps": args.steps, "tokens": TOKENS, "supernet": fingerprint_encoder(trained)[:12], "recipe": RECIPE}
    results = Results(args.results, QUESTION, settings)
    measure(args, start, FROZEN, results)
    measure(args, train_together(args, start), TOGETHER, results)
    print(answer(args.results, args.output_dir))


if __name__ == "__main__":
    main()
