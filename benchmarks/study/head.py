"""Train the masked-LM head that all-MiniLM-L6-v2 lacks, on top of its frozen encoder.

    python -m benchmarks.study.head --data DATA --bert MINILM

all-MiniLM-L6-v2 was made to embed sentences, so it has no masked-LM head, and without one neither perplexity nor the
recipe of the paper is defined. The head is that of BERT: a dense layer, GELU and LayerNorm, and the input embeddings
with a bias as decoder. Nothing but the dense layer, the LayerNorm and the bias learns.
"""

import argparse
from pathlib import Path

from accelerate import Accelerator
from transformers import AutoTokenizer, BertForMaskedLM

from supershaper_hf import SuperPretrainingArguments, SuperShaperForMaskedLM, load_text, super_pretrain, tokenize
from supershaper_hf.files import write_folder

from .study import make_parser, training_text


STEPS, BATCH_SIZE, MAX_LENGTH, LEARNING_RATE = 1000, 32, 128, 2e-3
FOLDER = "minilm-with-head"


def bert_with_head(args: argparse.Namespace) -> Path:
    """Return the folder of the BERT with its trained head. It is made if it is not there yet.

    Raises:
        SystemExit: If the training was interrupted. The same command continues.
    """
    folder = args.output_dir / FOLDER
    if folder.exists():
        return folder
    tokenizer = AutoTokenizer.from_pretrained(args.bert)
    supernet = SuperShaperForMaskedLM.from_bert(args.bert, width_choices=[384], attn_implementation="eager")
    supernet.bert.requires_grad_(False)
    options = SuperPretrainingArguments(
        max_steps=args.head_steps,
        per_device_train_batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
        group_by_length=True,
        learning_rate=LEARNING_RATE,
        sampling="fixed",
        no_dropout=True,
        mixed_precision="bf16",
        save_steps=200,
        output_dir=str(args.output_dir / "head"),
    )
    text = tokenize(load_text(training_text(args.data)), tokenizer, MAX_LENGTH)
    if super_pretrain(supernet, tokenizer, text, options, description="Head").status == "interrupted":
        raise SystemExit("Interrupted while the head was trained. Start the same command again.")
    bert = BertForMaskedLM.from_pretrained(args.bert)
    bert.cls.load_state_dict({**bert.cls.state_dict(), **supernet.cls.state_dict()})  # one bias has two names there

    def write(partial: Path) -> None:
        bert.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    return write_folder(folder, write)


def supernet_with_head(args: argparse.Namespace) -> Path:
    """Return the folder of the trained supernet, `args.trained`, with the head of the original. It is made once."""
    folder: Path = args.output_dir / "release" / "with-head"
    if folder.exists():
        return folder
    supernet = SuperShaperForMaskedLM.from_pretrained(args.trained)
    head = SuperShaperForMaskedLM.from_bert(bert_with_head(args))
    supernet.cls.load_state_dict(head.cls.state_dict())
    supernet.tie_weights()  # the decoder is the supernet's own embeddings
    return write_folder(folder, supernet.save_pretrained)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--head_steps", type=int, default=STEPS, help="training steps of the head")
    Accelerator(mixed_precision="bf16")
    print(bert_with_head(parser.parse_args()))


if __name__ == "__main__":
    main()
