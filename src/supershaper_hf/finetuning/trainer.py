"""`Trainer` with a teacher: besides its labels, a model learns from the logits of another one on the same examples."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperPreTrainedModel


class DistillingTrainer(Trainer):
    """A `Trainer` whose loss is (1 - weight) * loss on the labels + weight * distance to the teacher's logits.

    The distance is that of Hinton et al. (arXiv 1503.02531): the Kullback-Leibler divergence of both distributions at a
    temperature T, times T squared. For regression it is the squared error. It is a mean over what has a label, over all
    micro-batches of a step and all processes, as the loss on the labels is.

    Args:
        *args: The arguments of `Trainer`.
        teacher: A model for the same task with the same labels. Without one, the loss is that on the labels alone.
        weight: Share of the distance, 0 to 1.
        temperature: The temperature T.
        **kwargs: The arguments of `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        weight: float = 0.5,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.temperature = weight, temperature
        if not isinstance(self.model, SuperShaperPreTrainedModel):
            # Heads of transformers take `num_items_in_batch`, but most of their losses are means over the micro-batch
            # all the same: with 4 micro-batches, `Trainer` would make gradients 4 times too large.
            self.model_accepts_loss_kwargs = False
        self.teacher: Any = teacher
        if self.teacher is not None:
            self.teacher.to(self.args.device).eval()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch, as `Trainer` calls it. Scoring has the loss on the labels alone."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        taught = self.teach(inputs) if model.training else None
        if taught is not None:
            distance = logit_distance(outputs, taught, inputs, self.temperature)
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # The loss on the labels is this micro-batch's part of the step's mean, and so is the distance.
                distance = distance * inputs["labels"].ne(IGNORE_INDEX).sum() / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    distance = distance * self.accelerator.num_processes
            loss = (1 - self.weight) * loss + self.weight * distance
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def teach(self, inputs: dict[str, Any]) -> Any:
        """Return what the teacher makes of a micro-batch; `None` if there is none to learn from."""
        return None if self.teacher is None else self.teacher(**without_labels(inputs))


LABELS = ("labels", "start_positions", "end_positions")
LOGITS = ("logits", "start_logits", "end_logits")


def without_labels(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs of a model that computes logits and no loss."""
    return {name: tensor for name, tensor in inputs.items() if name not in LABELS}


def logit_distance(outputs: Any, taught: Any, inputs: dict[str, Any], temperature: float) -> torch.Tensor:
    """Return the mean distance between the logits of two models over what has a label.

    Args:
        outputs: The output of the model that learns.
        taught: The output of the teacher.
        inputs: The batch, with its labels. Positions with the label -100 do not count.
        temperature: The temperature of both distributions.
    """
    labels = inputs.get("labels")
    pairs = [(outputs[name], taught[name].to(outputs[name].dtype)) for name in LOGITS if name in outputs]
    if labels is not None and labels.is_floating_point():  # numbers, or one yes or no for each of several labels
        ((own, other),) = pairs
        if own.shape[-1] == 1:
            return nn.functional.mse_loss(own, other)
        sure = torch.sigmoid(other / temperature)
        entropy = nn.functional.binary_cross_entropy(sure, sure)
        return (nn.functional.binary_cross_entropy_with_logits(own / temperature, sure) - entropy) * temperature**2
    distances = []
    for own, other in pairs:
        if labels is not None and labels.ndim == own.ndim - 1:
            counted = labels.ne(IGNORE_INDEX)
            own, other = own[counted], other[counted]
        divergence = nn.functional.kl_div(
            (own / temperature).log_softmax(-1),
            (other / temperature).log_softmax(-1),
            log_target=True,
            reduction="none",
        )
        distances.append(divergence.sum(-1).mean())
    return torch.stack(distances).mean() * temperature**2
