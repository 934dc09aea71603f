"""Measure how well the embeddings of a sentence encoder, and of the subnets in a supernet, follow human judgement.

    python benchmarks/sentence_similarity.py --model outputs/supernet/last --pairs validation.csv
    python benchmarks/sentence_similarity.py --model outputs/supernet/last --pairs validation.csv --shapes 288 384,96,96

The file of pairs has the columns of GLUE's STS-B: sentence1, sentence2, and label, a similarity from 0 to 5. The score,
here called STS, is the rank correlation (Spearman's) between the labels and the cosines of the embeddings.

The first row is the model itself, for a supernet its largest shape. The other rows are the shapes that were asked for,
by default every smaller rectangle, in which all layers have the same width. If the folder of a subnet holds files of
`add_exports`, such as `onnx/model_quantized.onnx`, they are scored too.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperModel, markdown_table, read_pooling
from supershaper_hf.checks import check_choice
from supershaper_hf.publish.export import ONNX_FILE, QUANTIZED_FILE
from supershaper_hf.publish.quantization import onnx_session
from supershaper_hf.publish.sentences import POOLINGS
from supershaper_hf.search.evaluation import evaluation_mode
from supershaper_hf.training.losses import pool


COLUMNS = ("sentence1", "sentence2", "label")
BATCH_SIZE = 32


def load_pairs(file: str | Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Read pairs of sentences and their similarity, (pairs,), from a CSV file with the columns of GLUE's STS-B.

    Raises:
        ValueError: If a column is missing, a label is not a number, or there are fewer than two pairs.
    """
    with open(file, encoding="utf-8", newline="") as lines:
        reader = csv.DictReader(lines)
        missing = [column for column in COLUMNS if column not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{file} has no column {', '.join(missing)}. It needs {', '.join(COLUMNS)}.")
        rows = list(reader)
    if len(rows) < 2:
        raise ValueError(f"{file} has {len(rows)} pairs. A correlation needs at least 2.")
    try:
        labels = np.array([float(row["label"]) for row in rows])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} has a label that is not a number: {error}") from error
    return [(row["sentence1"], row["sentence2"]) for row in rows], labels


@torch.no_grad()
def embed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    pooling: str,
    shape: Sequence[int] | None = None,
) -> np.ndarray:
    """Return the embeddings of `sentences`, (sentences, hidden_size), in float32.

    Args:
        model: A model without a head, whose first output are the states of the tokens. Its mode, training or
            evaluation, stays; dropout is off here.
        tokenizer: Its tokenizer.
        sentences: Longer ones than the model can read are cut.
        pooling: "mean" or "cls", see `losses.pool`.
        shape: The shape of a supernet. By default the model is called without a shape, so it may be any BERT.
    """
    check_choice("pooling", pooling, POOLINGS)
    arguments: dict[str, Any] = {} if shape is None else {"shape": shape}
    longest = min(model.config.max_position_embeddings, tokenizer.model_max_length)
    encoded = tokenizer(list(sentences), truncation=True, max_length=longest)["input_ids"]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # little padding in each batch
    embeddings = np.empty((len(encoded), model.config.hidden_size), dtype=np.float32)
    with evaluation_mode(model):
        for start in range(0, len(order), BATCH_SIZE):
            indices = order[start : start + BATCH_SIZE]
            batch = tokenizer.pad({"input_ids": [encoded[index] for index in indices]}, return_tensors="pt")
            batch = batch.to(model.device)
            states = model(**batch, **arguments).last_hidden_state.float()
            embeddings[indices] = pool(states, batch["attention_mask"], pooling).cpu().numpy()
    return embeddings


def similarity_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    labels: np.ndarray,
    pooling: str,
    shape: Sequence[int] | None = None,
) -> float:
    """Return Spearman's correlation of the labels with the cosines of the two embeddings in each pair.

    The arguments are those of `embed`, and what `load_pairs` returns.
    """
    embeddings = embed(model, tokenizer, [sentence for pair in pairs for sentence in pair], pooling, shape)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return float(spearmanr((embeddings[0::2] * embeddings[1::2]).sum(1), labels).statistic)


class ExportedEncoder(torch.nn.Module):
    """An ONNX file that `add_exports` has made of `model`, called as `embed` calls the model itself."""

    def __init__(self, file: Path, model: PreTrainedModel):
        super().__init__()
        self.config, self.device, self.run = model.config, torch.device("cpu"), onnx_session(file)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> BaseModelOutput:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        inputs["token_type_ids"] = torch.zeros_like(input_ids)
        outputs = self.run({name: tensor.numpy() for name, tensor in inputs.items()})
        return BaseModelOutput(torch.from_numpy(outputs["last_hidden_state"]))


def read_shape(text: str, config: SuperShaperConfig) -> list[int]:
    """Return the shape that `text` means: one width for all layers, or one for each, with commas between them."""
    widths = [int(width) for width in text.split(",")]
    return config.normalize_shape(widths * config.num_hidden_layers if len(widths) == 1 else widths)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    labels: np.ndarray,
    pooling: str,
    shapes: Sequence[Sequence[int]],
    folder: Path,
) -> list[dict[str, str]]:
    """Return the rows of the table: the model itself, each of `shapes`, then the exported files in `folder`."""
    original = similarity_score(model, tokenizer, pairs, labels, pooling)
    rows = [{"shape": "the model itself", "parameters": f"{model.num_parameters():,}", "STS": f"{original:.4f}"}]
    rows[0]["share"] = share(original, original)
    for shape in shapes:
        score = similarity_score(model, tokenizer, pairs, labels, pooling, shape)
        row = {
            "shape": str(list(shape)),
            "parameters": f"{SearchSpace.from_model(model).num_parameters(shape):,}",
            "STS": f"{score:.4f}",
        }
        rows.append(row | {"share": share(score, original)})
    for name in (ONNX_FILE, QUANTIZED_FILE):
        if (folder / name).is_file():
            score = similarity_score(ExportedEncoder(folder / name, model), tokenizer, pairs, labels, pooling)
            size = f"{(folder / name).stat().st_size / 1e6:.1f} MB"
            rows.append({"shape": name, "parameters": size, "STS": f"{score:.4f}", "share": share(score, original)})
    return rows


def share(score: float, original: float) -> str:
    return f"{100 * score / original:.1f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a BERT, a supernet or a subnet")
    parser.add_argument("--pairs", required=True, help="CSV file with the columns sentence1, sentence2 and label")
    parser.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="how token states become one embedding; by default as the model says, or mean if it does not say it",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        help="shapes of the supernet: a width for all layers, or one for each with commas between them; by default "
        "each of its width choices below the largest one, for all layers",
    )
    args = parser.parse_args()
    pairs, labels = load_pairs(args.pairs)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model)
    shapes: list[list[int]] = []
    if isinstance(model, SuperShaperModel) and not model.config.merged_bottlenecks:
        asked = args.shapes or [str(width) for width in reversed(model.config.width_choices[:-1])]
        shapes = [read_shape(text, model.config) for text in asked]
    elif args.shapes:
        parser.error(f"--shapes are for a supernet, but {args.model} has one shape only. Leave them out.")
    pooling = args.pooling or read_pooling(args.model) or "mean"
    rows = measure(model, tokenizer, pairs, labels, pooling, shapes, Path(args.model))
    print(f"{len(pairs)} pairs, {pooling} pooling\n")
    print(markdown_table(rows))


if __name__ == "__main__":
    main()
