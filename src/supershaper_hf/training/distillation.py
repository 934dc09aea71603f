"""What a shape learns from: the labels, the largest shape of its step, and an outside teacher.

In each step the largest shape teaches the others, which is called in-place distillation (Yu and Huang, "Universally
Slimmable Networks", 2019, section 3.2). An outside teacher is a second model that does not change. If it is the
original, the BERT that the supernet was made of, shapes can learn from it alone, without labels and without a
vocabulary. In reading order: `watch_layers` and `watch_state` keep what the layers and the encoder compute in a forward
pass, and `Objective` adds up the losses of `losses.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_outputs import MaskedLMOutput

from ..checks import check_choice, check_count, check_number
from ..model.elastic import SuperShaperEncoder, SuperShaperSelfAttention, elastic_linear
from ..publish.sentences import POOLINGS
from .losses import (
    alpha_divergence,
    attention_loss,
    hidden_state_loss,
    pooled_loss,
    relation_loss,
    soft_cross_entropy,
    split_heads,
    state_loss,
)
from .teacher import OutsideTeacher, TeacherOutput


DIVERGENCES = ("cross_entropy", "alpha")
OUTPUT_WEIGHTS = ("state_weight", "pooled_weight", "first_token_weight")  # options that compare last hidden states
TEACHER_WEIGHTS = ("teacher_weight", *OUTPUT_WEIGHTS)  # options that need an outside teacher


@dataclass(frozen=True)
class LayerActivations:
    """What one layer computed at width w: `query`, `key`, `value` and its output `state`, (batch, length, w) each.

    In both head slicings, head h of the `num_heads` heads owns the h-th w / num_heads channels of query, key and value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    state: Tensor
    num_heads: int

    def detach(self) -> "LayerActivations":
        """Return the same tensors without their gradients."""
        query, key, value, state = (t.detach() for t in (self.query, self.key, self.value, self.state))
        return LayerActivations(query, key, value, state, self.num_heads)

    def attention(self) -> tuple[Tensor, Tensor]:
        """Return query and key as (batch, num_heads, length, head_size)."""
        return split_heads(self.query, self.num_heads), split_heads(self.key, self.num_heads)


@contextmanager
def watch_layers(model: nn.Module, layers: Sequence[int] | None) -> Iterator[dict[int, LayerActivations]]:
    """Keep the activations of `layers` in one forward pass inside the context. Gradients flow through them.

    A layer that the shape drops has no activations. Query, key and value are computed a second time, in a hook that
    runs before the layer, for two reasons. FSDP2 has gathered the layer's parameters at that moment. And gradient
    checkpointing runs the layer again in the backward pass, when the hooks are gone, but not what happened before it.

    Args:
        model: A supernet or a subnet, bare or wrapped (DDP, FSDP2).
        layers: Indices of the layers to watch, among those that `model` has. With `None` or an empty list nothing is
            watched.

    Yields:
        The activations by index of the layer. The forward pass fills them in.

    Raises:
        ValueError: If `model` contains no SuperShaper encoder.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> model = SuperShaperModel(config)
        >>> with watch_layers(model, [0, 1]) as activations:
        ...     output = model(torch.tensor([[1, 2, 3]]), shape=[0, 40])
        >>> {layer: layer_activations.state.shape for layer, layer_activations in activations.items()}
        {1: torch.Size([1, 3, 40])}
    """
    activations: dict[int, LayerActivations] = {}
    projected: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    handles: list[RemovableHandle] = []

    def watch(index: int, layer: nn.Module) -> None:
        attention = layer.get_submodule("attention.self")
        assert isinstance(attention, SuperShaperSelfAttention)

        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            states, _, narrow = inputs
            width = states.shape[-1]
            code = None if narrow is None else narrow.attention_code
            query, key, value = (
                elastic_linear(projection, states, width, out_heads=attention.sliced_heads, reads=code)
                for projection in (attention.query, attention.key, attention.value)
            )
            if attention.config.full_head_scale:  # as in a subnet, which divides scores by the size of its own heads
                query = query * (width / attention.config.hidden_size) ** 0.5
            projected[index] = query, key, value

        def after(_: nn.Module, inputs: tuple[Tensor, ...], state: Tensor) -> None:
            activations[index] = LayerActivations(*projected.pop(index), state, attention.num_heads)

        handles.extend((layer.register_forward_pre_hook(before), layer.register_forward_hook(after)))

    if layers:
        encoder = find_encoder(model)
        for index in layers:
            watch(index, encoder.layer[index])
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_state(model: nn.Module, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Keep the last hidden state, (batch, length, hidden_size), of each forward pass inside the context, in a list.

    It is what the encoder returns. Heads do not return it. Gradients flow through it.

    Args:
        model: A supernet or a subnet, with or without a head, bare or wrapped (DDP, FSDP2), compiled or not.
        wanted: Whether to watch at all.

    Raises:
        ValueError: If `model` contains no SuperShaper encoder.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperForMaskedLM
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> model = SuperShaperForMaskedLM(config)
        >>> with watch_state(model) as states:
        ...     output = model(torch.tensor([[1, 2, 3]]), shape=[0, 40])
        >>> [state.shape for state in states]
        [torch.Size([1, 3, 96])]
    """
    states: list[Tensor] = []
    if not wanted:
        yield states
        return
    handle = find_encoder(model).register_forward_hook(lambda module, inputs, state: states.append(state))
    try:
        yield states
    finally:
        handle.remove()


def find_encoder(model: nn.Module) -> SuperShaperEncoder:
    """Return the encoder inside `model`, or raise a ValueError if it has none."""
    encoder = next((module for module in model.modules() if isinstance(module, SuperShaperEncoder)), None)
    if encoder is None:
        raise ValueError(f"{type(model).__name__} has no SuperShaperEncoder. Give a SuperShaper model.")
    return encoder


@dataclass(frozen=True)
class Largest:
    """What the largest shape of a step teaches the others. Gradients do not flow into it.

    Attributes:
        logits: (labelled positions, vocab_size); `None` if nothing is labelled.
        activations: By index of the layer.
    """

    logits: Tensor | None
    activations: Mapping[int, LayerActivations]

    @classmethod
    def of(cls, output: MaskedLMOutput, activations: Mapping[int, LayerActivations]) -> "Largest":
        """Detach the results of the first forward pass of a step."""
        logits = None if output.logits is None else output.logits.detach()
        return cls(logits, {layer: found.detach() for layer, found in activations.items()})


@dataclass(frozen=True)
class Objective:
    """What every shape of a step learns from. Its loss has parts that are means over different positions.

    `label_loss` is a mean over the labelled positions: the cross-entropy with the labels, mixed with that to the
    predictions of the largest shape. `layer_loss` is a mean over all tokens: how far the layers are from those of the
    largest shape and of an outside teacher. `output_losses` are a mean over all tokens and one over sequences: how far
    the last hidden state is from that of an outside teacher, token by token and pooled.

    Args:
        distillation_weight: Share of the predictions of the largest shape in `label_loss`. With 0 a shape learns from
            the labels only, with 1 from the largest shape only. The largest shape itself always learns from the labels.
        temperature: Temperature of `soft_cross_entropy`.
        divergence: `"cross_entropy"` for `soft_cross_entropy`, or `"alpha"` for `alpha_divergence`.
        hidden_weight: Factor of `hidden_state_loss`, which compares a shape with the largest one.
        attention_weight: Factor of `attention_loss`, which compares a shape with the largest one.
        teacher: An outside teacher. The largest shape learns from it too.
        teacher_weight: Factor of `relation_loss`, which compares a shape with the outside teacher.
        relation_heads: Number of heads in `relation_loss`; with `None`, as many as the student has attention heads.
        state_weight: Factor of `state_loss`, which compares last hidden states with those of the outside teacher.
        pooled_weight: Factor of `pooled_loss`, which compares pooled last hidden states with those of the outside
            teacher.
        first_token_weight: Factor of `state_loss` of the first token, [CLS], whose state classifiers read.
        pooling: How states are pooled: `"mean"` or `"cls"`.
        labels: Whether there are labels to learn from. Without them the loss that is reported is `state_loss`, so
            `state_weight` has to be above 0.

    Raises:
        ValueError: If a value is out of range, or if two values do not go together.

    Example:
        >>> Objective(distillation_weight=0.5).in_place
        True
        >>> Objective(hidden_weight=1.0).layers([48, 0, 36])
        [0, 2]
    """

    distillation_weight: float = 0.0
    temperature: float = 1.0
    divergence: str = "cross_entropy"
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    teacher: OutsideTeacher | None = None
    teacher_weight: float = 0.0
    relation_heads: int | None = None
    state_weight: float = 0.0
    pooled_weight: float = 0.0
    first_token_weight: float = 0.0
    pooling: str = "mean"
    labels: bool = True

    def __post_init__(self) -> None:
        check_number("distillation_weight", self.distillation_weight, least=0, most=1)
        check_number("temperature", self.temperature, above=0)
        check_choice("divergence", self.divergence, DIVERGENCES)
        check_choice("pooling", self.pooling, POOLINGS)
        for name in ("hidden_weight", "attention_weight", *TEACHER_WEIGHTS):
            check_number(name, getattr(self, name), least=0)
        if self.relation_heads is not None:
            check_count("relation_heads", self.relation_heads)
        if self.divergence == "alpha" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} does not go with divergence='alpha', which has none. Leave it at 1, "
                "or use divergence='cross_entropy'."
            )
        weights = {name: getattr(self, name) for name in TEACHER_WEIGHTS if getattr(self, name) > 0}
        if self.teacher is None and weights:
            name, weight = next(iter(weights.items()))
            raise ValueError(f"{name}={weight} needs a teacher. Give one, or set the weight to 0.")
        if self.teacher is not None and not weights:
            raise ValueError(
                f"A teacher is given, but {', '.join(f'{name}=0' for name in TEACHER_WEIGHTS)}. Give one of them a "
                "weight above 0, or leave the teacher out."
            )
        if not self.labels and self.state_weight == 0:
            raise ValueError("labels=False leaves state_weight=0 nothing to report. Give state_weight a value above 0.")
        if not self.labels and self.distillation_weight > 0:
            raise ValueError(
                f"distillation_weight={self.distillation_weight} compares predictions of labelled tokens, and with "
                "labels=False there are none. Set it to 0."
            )

    @property
    def in_place(self) -> bool:
        """Whether the largest shape of a step teaches the others."""
        return self.distillation_weight > 0 or self._matches_largest

    @property
    def compares_outputs(self) -> bool:
        """Whether the last hidden state is compared with that of the outside teacher."""
        return any(getattr(self, name) > 0 for name in OUTPUT_WEIGHTS)

    @property
    def _matches_largest(self) -> bool:
        """Whether the layers of a shape are compared with those of the largest one."""
        return self.hidden_weight > 0 or self.attention_weight > 0

    def layers(self, shape: Sequence[int]) -> list[int]:
        """Return the layers to watch in a forward pass at `shape`: those that `layer_loss` needs, and no others.

        The largest shape drops no layer, so its activations are there for every layer that another shape keeps.
        """
        kept = [layer for layer, width in enumerate(shape) if width]
        if self._matches_largest:
            return kept
        return kept[-1:] if self.teacher_weight > 0 else []

    def label_loss(self, output: MaskedLMOutput, largest: Largest | None) -> Tensor:
        """Return the mean loss over the labelled positions, in nats.

        Args:
            output: Output of a forward pass with labels and `sparse_prediction=True`, so that its logits are
                (labelled positions, vocab_size).
            largest: Result of the first forward pass of the step; `None` in that pass itself.
        """
        assert output.loss is not None
        if largest is None or self.distillation_weight == 0:
            return output.loss
        assert output.logits is not None
        assert largest.logits is not None
        if len(output.logits) == 0:  # There is nothing to compare, and a mean would be undefined.
            return output.loss
        if self.divergence == "alpha":
            soft_loss = alpha_divergence(output.logits, largest.logits)
        else:
            soft_loss = soft_cross_entropy(output.logits, largest.logits, self.temperature)
        return (1 - self.distillation_weight) * output.loss + self.distillation_weight * soft_loss

    def layer_loss(
        self,
        activations: Mapping[int, LayerActivations],
        attention_mask: Tensor,
        largest: Largest | None,
        outside: TeacherOutput | None,
    ) -> Tensor:
        """Return the mean loss over all tokens that are not padding; 0 if no layer is compared with anything.

        Args:
            activations: What `watch_layers(model, self.layers(shape))` kept of the forward pass.
            attention_mask: (batch, length), 0 for padding.
            largest: Result of the first forward pass of the step; `None` in that pass itself.
            outside: What `self.teacher` returned for the batch.

        Raises:
            ValueError: If activations, or what the outside teacher returned, are needed and missing.
        """
        loss = torch.zeros((), device=attention_mask.device)
        if not self._matches_largest and self.teacher_weight == 0:
            return loss
        if not activations:
            raise ValueError(
                "No layer was watched. Run the forward pass inside watch_layers(model, objective.layers(shape))."
            )
        if largest is not None and self._matches_largest:
            loss = loss + self._loss_to_largest(activations, attention_mask, largest)
        if self.teacher_weight > 0:
            loss = loss + self._loss_to_outside(activations, attention_mask, _given(outside))
        return loss

    def output_losses(
        self, states: Sequence[Tensor], attention_mask: Tensor, outside: TeacherOutput | None
    ) -> tuple[Tensor, Tensor]:
        """Return the losses of the last hidden state, each 0 if nothing is compared.

        The first is `state_loss` without its factor, a mean over tokens. The second is a mean over sequences: the sum
        of `pooled_loss` and of `state_loss` of the first token, with their factors.

        Args:
            states: What `watch_state(model)` kept of the forward pass.
            attention_mask: (batch, length), 0 for padding.
            outside: What `self.teacher` returned for the batch.

        Raises:
            ValueError: If the state, or what the outside teacher returned, is needed and missing.
        """
        by_token = by_sequence = torch.zeros((), device=attention_mask.device)
        if not self.compares_outputs:
            return by_token, by_sequence
        if not states:
            raise ValueError("No state was watched. Run the forward pass inside watch_state(model).")
        student, teacher = states[-1], _given(outside).state
        if self.state_weight > 0:
            by_token = state_loss(student, teacher, attention_mask)
        if self.pooled_weight > 0:
            by_sequence = self.pooled_weight * pooled_loss(student, teacher, attention_mask, self.pooling)
        if self.first_token_weight > 0:
            first = (states[:, :1] for states in (student, teacher, attention_mask))
            by_sequence = by_sequence + self.first_token_weight * state_loss(*first)
        return by_token, by_sequence

    def _loss_to_largest(
        self, activations: Mapping[int, LayerActivations], attention_mask: Tensor, largest: Largest
    ) -> Tensor:
        """Compare every layer that the shape kept with the same layer of the largest shape."""
        loss = torch.zeros((), device=attention_mask.device)
        students, teachers = list(activations.values()), [largest.activations[layer] for layer in activations]
        if self.hidden_weight > 0:
            states = [s.state for s in students], [t.state for t in teachers]
            loss = loss + self.hidden_weight * hidden_state_loss(*states, attention_mask)
        if self.attention_weight > 0:
            attentions = [s.attention() for s in students], [t.attention() for t in teachers]
            loss = loss + self.attention_weight * attention_loss(*attentions, attention_mask)
        return loss

    def _loss_to_outside(
        self, activations: Mapping[int, LayerActivations], attention_mask: Tensor, outside: TeacherOutput
    ) -> Tensor:
        """Compare the last layer that the shape kept with the layer of the outside teacher."""
        last = activations[max(activations)]
        heads = self.relation_heads or last.num_heads
        student, teacher = (last.query, last.key, last.value), (outside.query, outside.key, outside.value)
        return self.teacher_weight * relation_loss(student, teacher, heads, attention_mask)


def _given(outside: TeacherOutput | None) -> TeacherOutput:
    if outside is None:
        raise ValueError("The outside teacher's output is missing. Pass outside=objective.teacher(batch).")
    return outside
