"""The models that questions 6, 7 and 8 compare: the original, the whole supernet, and its subnets of equal size.

The shape of a budget is the one that the command line takes, too: the best predicted one of the front. Budgets count
the encoder without a head, so that the same shapes stand in all three tables.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel

from supershaper_hf import SearchSpace, SuperShaperConfig, SuperShaperModel
from supershaper_hf.publish.export import export_onnx
from supershaper_hf.publish.quantization import quantize
from supershaper_hf.report.findings import Findings
from supershaper_hf.search.fingerprints import fingerprint_encoder
from supershaper_hf.search.pareto import pareto_front

from .shapes import FIRST_LAYERS, RECTANGLE, SEARCHED, SHARES, budget, hand_crafted
from .study import Row, encoder_parameters


ORIGINAL, SUPERNET = "original", "supernet"
KINDS = (SEARCHED, RECTANGLE, FIRST_LAYERS)  # of subnets, at each share
ORDER = (0.60, 0.30, 0.75, 0.45)  # in which shares are measured: those with a target first
ONNX, INT8 = "onnx", "int8"


@dataclass(frozen=True)
class Compared:
    """One of the compared models.

    Attributes:
        kind: `ORIGINAL`, `SUPERNET` or one of `KINDS`.
        share: The budget, as a share of the parameters in the layers of the original; `None` without a budget.
        shape: The widths of the layers; `None` for the original.
        parameters: Of the model without a head.
        encoder: The parameters outside the embeddings and the pooler, as a share of the original's.
    """

    kind: str
    share: float | None
    shape: list[int] | None
    parameters: int
    encoder: float

    @property
    def name(self) -> str:
        """What tables call it."""
        return self.kind if self.share is None else f"{self.kind} {self.share:.0%}"

    def row(self) -> Row:
        """Return what every row of results says of the model."""
        return {
            "model": self.name,
            "kind": self.kind,
            "share": self.share,
            "shape": self.shape,
            "parameters": self.parameters,
            "encoder": round(self.encoder, 4),
        }


def by_size(rows: Sequence[Row]) -> list[Row]:
    """Return rows from the largest budget to the smallest; the original and the supernet come first."""
    kinds = [ORIGINAL, SUPERNET, *KINDS]
    return sorted(rows, key=lambda row: (-(row["share"] or 2), kinds.index(row["kind"])))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which models are compared."""
    parser.add_argument("--search", type=Path, help="folder of the search; by default `search` in that of the supernet")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=ORDER, choices=SHARES, help="budgets, in the order of measuring"
    )


def search_folder(args: argparse.Namespace) -> Path:
    """Return the folder of the search that the options name."""
    return args.search or Path(args.supernet) / "search"


def compared_models(
    bert: str, supernet: str | None, search: Path | None, shares: Sequence[float] = ORDER
) -> list[Compared]:
    """Return the compared models in the order of measuring: the supernet comes after the shares that have a target.

    Args:
        bert: Folder of the original.
        supernet: Folder of the supernet; without one, the original is alone.
        search: Folder of its search.
        shares: The budgets, in the order of measuring.
    """
    original = load_original(bert)
    config: Any = original.config
    bare = original.num_parameters()
    layers = encoder_parameters(config)
    found = [Compared(ORIGINAL, None, None, bare, 1.0)]
    if supernet is None or search is None:
        return found
    findings = Findings.read(search)
    space = SearchSpace.from_config(SuperShaperConfig.from_pretrained(supernet), SuperShaperModel.__name__)
    front = pareto_front(space, findings.predictor, "parameters")

    def compared(kind: str, share: float | None, shape: list[int]) -> Compared:
        parameters = space.num_parameters(shape)
        return Compared(kind, share, shape, parameters, (parameters - bare + layers) / layers)

    for share in shares:
        most = budget(config, share, bare)
        found.append(compared(SEARCHED, share, front.best(max_cost=most)))
        found += [compared(kind, share, hand_crafted(space, kind, most)) for kind in KINDS[1:]]
    later = 1 + len(KINDS) * sum(share in ORDER[:2] for share in shares)
    found.insert(later, compared(SUPERNET, None, space.largest))
    return found


@lru_cache(maxsize=1)
def load_original(bert: str) -> PreTrainedModel:
    """Return the original without a head, in float32."""
    return AutoModel.from_pretrained(bert, dtype=torch.float32).eval()


@lru_cache(maxsize=1)
def load_supernet(supernet: str) -> SuperShaperModel:
    """Return the supernet without a head, in float32."""
    return SuperShaperModel.from_pretrained(supernet, dtype=torch.float32).eval()


def load_encoder(compared: Compared, bert: str, supernet: str) -> PreTrainedModel:
    """Return a compared model without a head: the original, or what is cut out of the supernet."""
    if compared.shape is None:
        return load_original(bert)
    return load_supernet(supernet).extract_subnet(compared.shape).eval()


def check_supernet(rows: Sequence[Row], supernet: str) -> str:
    """Return the beginning of the fingerprint of a supernet, which stands in the rows of its subnets.

    Raises:
        ValueError: If some of `rows` were measured with another supernet.
    """
    fingerprint = fingerprint_encoder(load_supernet(supernet))[:12]
    others = {row["supernet"] for row in rows if row.get("supernet") is not None} - {fingerprint}
    if others:
        raise ValueError(
            f"There are rows of another supernet ({', '.join(sorted(others))}) than {supernet} ({fingerprint}). Remove "
            "them from the file of results, or choose another folder with --results."
        )
    return fingerprint


def check_shapes(rows: Sequence[Row], models: Sequence[Compared]) -> None:
    """Raise a ValueError if some of `rows` have the name of a model but another shape: of another search."""
    shapes = {model.name: model.shape for model in models}
    for row in rows:
        if "shape" in row and row["shape"] != shapes.get(row["model"], row["shape"]):
            raise ValueError(
                f"There are rows of {row['model']} with the shape {row['shape']}, but it is {shapes[row['model']]} in "
                "this search. Give the search that they were measured with, or another folder with --results."
            )


def export_files(model: PreTrainedModel, folder: Path, tokenizer_folder: str | Path) -> dict[str, Path]:
    """Write the files of `add_exports` for any BERT: 32-bit floats and 8-bit integers.

    Args:
        model: With or without a head.
        folder: Where the files are written.
        tokenizer_folder: Its tokenizer encodes the texts that the settings of the 8-bit file are chosen by.
    """
    files = {ONNX: folder / "model.onnx", INT8: folder / "model_quantized.onnx"}
    export_onnx(model, files[ONNX])  # type: ignore[arg-type]
    quantize(files[ONNX], files[INT8], model, Path(tokenizer_folder))  # type: ignore[arg-type]
    return files
