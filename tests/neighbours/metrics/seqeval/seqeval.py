"""The scores of the package seqeval, in place of the script `seqeval` that `evaluate` fetches from the Hub."""

import datasets
import evaluate
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score


SCORES = {"precision": precision_score, "recall": recall_score, "f1": f1_score}


class Seqeval(evaluate.Metric):
    def _info(self):
        labels = datasets.List(datasets.Value("string"))
        features = datasets.Features({"predictions": labels, "references": labels})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        scores = {f"overall_{name}": score(references, predictions, zero_division=0) for name, score in SCORES.items()}
        return scores | {"overall_accuracy": accuracy_score(references, predictions)}
