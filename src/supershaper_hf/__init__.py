"""Elastic BERT on the Hugging Face Hub: train one supernet, cut out the subnet that fits.

Importing the package registers SuperShaper with the Auto classes of transformers.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .convert.importance import reorder_channels
from .latency.table import LatencyTable
from .model.configuration_supershaper import SuperShaperConfig
from .model.modeling_supershaper import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)
from .model.shapes import SearchSpace
from .publish.hub import push_to_hub, save_for_hub
from .search.evaluation import evaluate_shapes
from .search.evolution import evolutionary_search
from .search.pareto import ParetoFront, pareto_front
from .search.predictor import ShapePredictor


__version__ = "0.1.0"

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
    "LatencyTable",
    "ParetoFront",
    "SearchSpace",
    "ShapePredictor",
    "SuperShaperConfig",
    "SuperShaperForMaskedLM",
    "SuperShaperForMultipleChoice",
    "SuperShaperForQuestionAnswering",
    "SuperShaperForSequenceClassification",
    "SuperShaperForTokenClassification",
    "SuperShaperModel",
    "evaluate_shapes",
    "evolutionary_search",
    "pareto_front",
    "push_to_hub",
    "reorder_channels",
    "save_for_hub",
]
