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

from .configuration_supershaper import SuperShaperConfig
from .evaluation import evaluate_shapes
from .evolution import evolutionary_search
from .hub import push_to_hub, save_for_hub
from .importance import reorder_channels
from .latency import LatencyTable
from .modeling_supershaper import (
    SuperShaperForMaskedLM,
    SuperShaperForMultipleChoice,
    SuperShaperForQuestionAnswering,
    SuperShaperForSequenceClassification,
    SuperShaperForTokenClassification,
    SuperShaperModel,
)
from .predictor import ShapePredictor
from .search import ParetoFront, pareto_front
from .shapes import SearchSpace


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
