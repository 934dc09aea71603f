"""`Trainer` with a teacher: besides labels, a model learns from its logits, and from its last hidden states."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_outputs import ModelOutput

from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperPreTrainedModel
from ..training.losses import state_loss


class DistillingTrainer(Trainer):
    """A `Trainer` with the loss (1 - weight) * labels + weight * logits + state_weight * states.

    `labels` is the loss on the labels, `logits` the distance to the teacher's logits, and `states` the relative squared
    error of the last hidden states (`state_loss`). One label says little about an example, and the states of a whole
    sequence say much of how the teacher reads it: TinyBERT (arXiv 1909.10351) calls this task-specific distillation.

    The distance is that of Hinton et al. (arXiv 1503.02531): the Kullback-Leibler divergence of both distributions at a
    temperature T, times T squared. For regression it is the squared error. It is a mean over what has a label, over all
    micro-batches of a step and all processes, as the loss on the labels is. The error of the states is a mean over the
    tokens of a micro-batch, and micro-batches count by their labels.

    Args:
        *args: The arguments of `Trainer`.
        teacher: A model for the same task with the same labels. Without one, the loss is that on the labels alone.
        weight: Share of the distance, 0 to 1.
        temperature: The temperature T.
        state_weight: Factor of the error of the last hidden states, which have to be as wide as the teacher's.
        **kwargs: The arguments of `Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        weight: float = 0.5,
        temperature: float = 1.0,
        state_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight, self.temperature, self.state_weight = weight, temperature, state_weight
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
        with watch_state(self.accelerator.unwrap_model(model), model.training and self.state_weight > 0) as states:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        taught = self.teach(inputs) if model.training else None
        if taught is not None:
            distance = self.weight * logit_distance(outputs, taught, inputs, self.temperature)
            if "state" in taught:
                error = state_loss(states[0], taught["state"], inputs["attention_mask"])
                distance = distance + self.state_weight * error
            if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
                # The loss on the labels is this micro-batch's part of the step's mean, and so is the distance.
                distance = distance * inputs["labels"].ne(IGNORE_INDEX).sum() / num_items_in_batch
                if self.args.average_tokens_across_devices:
                    distance = distance * self.accelerator.num_processes
            loss = (1 - self.weight) * loss + distance
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def teach(self, inputs: dict[str, Any]) -> Any:
        """Return what the teacher makes of a micro-batch; `None` if there is no teacher.

        It has the names of `LOGITS` and, if states are compared, `state`: (batch, length, hidden_size).
        """
        if self.teacher is None:
            return None
        with watch_state(self.teacher, self.state_weight > 0) as states:
            taught = self.teacher(**without_labels(inputs))
        found = {name: taught[name] for name in LOGITS if name in taught}
        return ModelOutput(found | dict(zip(["state"], states)))


@contextmanager
def watch_state(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Keep the last hidden state, (batch, length, hidden_size), of each forward pass inside the context, in a list.

    Args:
        model: Any model of transformers with a base model, whose first output it is. Gradients flow through it.
        wanted: Whether to watch at all.
    """
    states: list[Tensor] = []
    base: nn.Module = model.base_model
    handle = base.register_forward_hook(lambda module, inputs, output: states.append(output[0])) if wanted else None
    try:
        yield states
    finally:
        if handle is not None:
            handle.remove()


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
