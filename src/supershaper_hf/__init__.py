"""Elastic BERT on the Hugging Face Hub: train one supernet, then cut out the subnet that fits your device.

Importing the package registers SuperShaper with the Auto classes of transformers. Every other public name is imported
when it is first used, so loading a model costs no more than transformers itself.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .model.configuration_supershaper import SuperShaperConfig
from .model.modeling_supershaper import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)


if TYPE_CHECKING:  # the names of `LAZY` again, for type checkers and editors; a test compares the two
    from .convert.bert import from_bert as from_bert
    from .convert.calibration import calibrate as calibrate
    from .convert.extraction import extract_from_folder as extract_from_folder
    from .convert.original import from_original as from_original
    from .convert.polishing import polish as polish
    from .data.batches import calibration_batches as calibration_batches
    from .data.batches import fixed_masks as fixed_masks
    from .data.documents import load_text as load_text
    from .data.documents import split_text as split_text
    from .data.sequences import tokenize as tokenize
    from .data.sequences import train_tokenizer as train_tokenizer
    from .latency.insensitivity import compare_equal_sizes as compare_equal_sizes
    from .latency.table import LatencyTable as LatencyTable
    from .model.shapes import SHAPE_NAMES as SHAPE_NAMES
    from .model.shapes import SearchSpace as SearchSpace
    from .publish.export import add_exports as add_exports
    from .publish.hub import push_folder as push_folder
    from .publish.hub import push_to_hub as push_to_hub
    from .publish.hub import save_for_hub as save_for_hub
    from .publish.sentences import read_pooling as read_pooling
    from .publish.sentences import read_sentence_encoder as read_sentence_encoder
    from .report.page import write_report as write_report
    from .report.plots import plot_front as plot_front
    from .report.tables import markdown_table as markdown_table
    from .report.tables import text_table as text_table
    from .search.evaluation import evaluate_shapes as evaluate_shapes
    from .search.evolution import evolutionary_search as evolutionary_search
    from .search.pareto import ParetoFront as ParetoFront
    from .search.pareto import pareto_front as pareto_front
    from .search.pareto import shapes_at as shapes_at
    from .search.predictor import ShapePredictor as ShapePredictor
    from .search.profile import derive_profile as derive_profile
    from .search.records import read_records as read_records
    from .search.rounds import best_measured as best_measured
    from .search.rounds import measure_in_rounds as measure_in_rounds
    from .training.arguments import SuperPretrainingArguments as SuperPretrainingArguments
    from .training.loop import super_pretrain as super_pretrain

LAZY = {  # public name -> the module that it is imported from
    "LatencyTable": "latency.table",
    "ParetoFront": "search.pareto",
    "SHAPE_NAMES": "model.shapes",
    "SearchSpace": "model.shapes",
    "ShapePredictor": "search.predictor",
    "SuperPretrainingArguments": "training.arguments",
    "add_exports": "publish.export",
    "best_measured": "search.rounds",
    "calibrate": "convert.calibration",
    "calibration_batches": "data.batches",
    "compare_equal_sizes": "latency.insensitivity",
    "derive_profile": "search.profile",
    "evaluate_shapes": "search.evaluation",
    "evolutionary_search": "search.evolution",
    "extract_from_folder": "convert.extraction",
    "fixed_masks": "data.batches",
    "from_bert": "convert.bert",
    "from_original": "convert.original",
    "load_text": "data.documents",
    "markdown_table": "report.tables",
    "measure_in_rounds": "search.rounds",
    "pareto_front": "search.pareto",
    "plot_front": "report.plots",
    "polish": "convert.polishing",
    "push_folder": "publish.hub",
    "push_to_hub": "publish.hub",
    "read_pooling": "publish.sentences",
    "read_records": "search.records",
    "read_sentence_encoder": "publish.sentences",
    "save_for_hub": "publish.hub",
    "shapes_at": "search.pareto",
    "split_text": "data.documents",
    "super_pretrain": "training.loop",
    "text_table": "report.tables",
    "tokenize": "data.sequences",
    "train_tokenizer": "data.sequences",
    "write_report": "report.page",
}

AutoConfig.register("supershaper", SuperShaperConfig)
SuperShaperConfig.register_for_auto_class()
AUTO_CLASSES: dict[Any, Any] = {
    AutoModel: SuperShaperModel,
    AutoModelForMaskedLM: SuperShaperForMaskedLM,
    AutoModelForSequenceClassification: SuperShaperForSequenceClassification,
    AutoModelForTokenClassification: SuperShaperForTokenClassification,
    AutoModelForQuestionAnswering: SuperShaperForQuestionAnswering,
    AutoModelForMultipleChoice: SuperShaperForMultipleChoice,
}
for auto_class, model_class in AUTO_CLASSES.items():
    auto_class.register(SuperShaperConfig, model_class)
    # Saving then copies the modeling files beside the weights, so the folder loads without this package.
    model_class.register_for_auto_class(auto_class.__name__)

__all__ = [
    "SuperShaperConfig",
    *(model_class.__name__ for model_class in AUTO_CLASSES.values()),
    *LAZY,
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("supershaper-hf")
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LAZY, "__version__"})
