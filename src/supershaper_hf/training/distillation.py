"""What a shape learns from: the labels, the largest shape of its step, and an outside teacher.

In each step the largest shape teaches the others, which is called in-place distillation (Yu and Huang, "Universally
Slimmable Networks", 2019, section 3.2). In reading order: `watch_layers` keeps what the layers compute in a forward
pass, `OutsideTeacher` is a second model that teaches, and `Objective` adds up the losses of `losses.py`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from ..checks import check_choice, check_count, check_number
from ..devices import copy_mapped_weights
from ..model.elastic import SuperShaperEncoder, SuperShaperSelfAttention, elastic_linear
from .losses import alpha_divergence, attention_loss, hidden_state_loss, relation_loss, soft_cross_entropy, split_heads


DIVERGENCES = ("cross_entropy", "alpha")

# What a layer's query, key and value projections are called in BERT, RoBERTa, ELECTRA and SuperShaper; in DistilBERT;
# and in MPNet. The dot before `attention` leaves out `crossattention`, which decoders have.
PROJECTIONS = (
    (".attention.self.query", ".attention.self.key", ".attention.self.value"),
    (".attention.q_lin", ".attention.k_lin", ".attention.v_lin"),
    (".attention.attn.q", ".attention.attn.k", ".attention.attn.v"),
)


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
        encoder = next((module for module in model.modules() if isinstance(module, SuperShaperEncoder)), None)
        if encoder is None:
            raise ValueError(f"{type(model).__name__} has no SuperShaperEncoder. Give a SuperShaper model.")
        for index in layers:
            watch(index, encoder.layer[index])
    try:
        yield activations
    finally:
        for handle in handles:
            handle.remove()


class OutsideTeacher:
    """A second model, of any depth and width, that teaches the last layer of every shape through `relation_loss`.

    The model is frozen and put into evaluation mode; it keeps its dtype. It reads the student's token ids, so it must
    have been trained with the same tokenizer. Weights that are still mapped to their file are copied into memory, see
    `devices.copy_mapped_weights`.

    Args:
        model: A BERT, RoBERTa, ELECTRA, DistilBERT, MPNet or SuperShaper model, with or without a head. It is changed
            in place.
        layer: The layer that teaches; negative numbers count from the end. MiniLMv2 takes the last layer of teachers of
            base size, and a layer of the upper middle of large ones.

    Raises:
        ValueError: If the projections of its layers are not found, or `layer` is out of range.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"vocab_size": 50, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> teacher = OutsideTeacher(BertModel(BertConfig(**sizes)), layer=0)
        >>> query, key, value = teacher({"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)})
        >>> query.shape
        torch.Size([1, 3, 96])
    """

    def __init__(self, model: PreTrainedModel, layer: int = -1) -> None:
        # The head is left out: for a whole vocabulary at every position it would cost as much as several layers.
        self.model = model.base_model.eval().requires_grad_(False)
        copy_mapped_weights(self.model)
        modules = dict(self.model.named_modules())
        found = [
            [modules[name.removesuffix(names[0]) + projection] for projection in names]
            for name in modules
            for names in PROJECTIONS
            if name.endswith(names[0])
        ]
        kind = type(model).__name__
        if not found:
            expected = ", ".join(f"*{names[0]}" for names in PROJECTIONS)
            raise ValueError(
                f"{kind} has no query, key and value projections where they are looked for ({expected}). Use a BERT, "
                "RoBERTa, ELECTRA, DistilBERT, MPNet or SuperShaper model as teacher."
            )
        if not -len(found) <= layer < len(found):
            raise ValueError(f"layer={layer}: {kind} has layers 0 to {len(found) - 1}, or -{len(found)} to -1.")
        self.projections = found[layer]
        self.layer = layer % len(found)

    @cached_property
    def fingerprint(self) -> str:
        """A checksum of the weights and the layer, which tells whether another run has the same teacher."""
        digest = hashlib.sha256(f"layer {self.layer}".encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value of the layer that teaches, (batch, length, teacher width) each.

        Args:
            batch: `input_ids` and `attention_mask`, (batch, length). The teacher moves to their device.
        """
        outputs: list[Tensor] = []
        handles = [
            projection.register_forward_hook(lambda module, inputs, output: outputs.append(output))
            for projection in self.projections
        ]
        try:
            if self.model.device != batch["input_ids"].device:
                self.model.to(batch["input_ids"].device)
            self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            for handle in handles:
                handle.remove()
        query, key, value = outputs
        return query, key, value


@dataclass(frozen=True)
class Largest:
    """What the largest shape of a step teaches the others. Gradients do not flow into it.

    Attributes:
        logits: (labelled positions, vocab_size).
        activations: By index of the layer.
    """

    logits: Tensor
    activations: Mapping[int, LayerActivations]

    @classmethod
    def of(cls, output: MaskedLMOutput, activations: Mapping[int, LayerActivations]) -> "Largest":
        """Detach the results of the first forward pass of a step."""
        assert output.logits is not None
        return cls(output.logits.detach(), {layer: found.detach() for layer, found in activations.items()})


@dataclass(frozen=True)
class Objective:
    """What every shape of a step learns from. Its loss has two parts, which are means over different positions.

    `label_loss` is a mean over the labelled positions: the cross-entropy with the labels, mixed with that to the
    predictions of the largest shape. `layer_loss` is a mean over all tokens: how far the layers are from those of the
    largest shape and of an outside teacher.

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

    def __post_init__(self) -> None:
        check_number("distillation_weight", self.distillation_weight, least=0, most=1)
        check_number("temperature", self.temperature, above=0)
        check_choice("divergence", self.divergence, DIVERGENCES)
        for name in ("hidden_weight", "attention_weight", "teacher_weight"):
            check_number(name, getattr(self, name), least=0)
        if self.relation_heads is not None:
            check_count("relation_heads", self.relation_heads)
        if self.divergence == "alpha" and self.temperature != 1:
            raise ValueError(
                f"temperature={self.temperature} does not go with divergence='alpha', which has none. Leave it at 1, "
                "or use divergence='cross_entropy'."
            )
        if self.teacher is None and self.teacher_weight > 0:
            raise ValueError(f"teacher_weight={self.teacher_weight} needs a teacher. Give one, or set the weight to 0.")
        if self.teacher is not None and self.teacher_weight == 0:
            raise ValueError("A teacher is given, but teacher_weight=0. Give it a weight above 0, or leave it out.")

    @property
    def in_place(self) -> bool:
        """Whether the largest shape of a step teaches the others."""
        return self.distillation_weight > 0 or self._matches_largest

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
        return [] if self.teacher is None else kept[-1:]

    def label_loss(self, output: MaskedLMOutput, largest: Largest | None) -> Tensor:
        """Return the mean loss over the labelled positions, in nats.

        Args:
            output: Output of a forward pass with labels and `sparse_prediction=True`, so that its logits are
                (labelled positions, vocab_size).
            largest: Result of the first forward pass of the step; `None` in that pass itself.
        """
        assert output.loss is not None
        assert output.logits is not None
        # Without labelled positions there is nothing to compare, and a mean would be undefined.
        if largest is None or self.distillation_weight == 0 or len(output.logits) == 0:
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
        outside: Sequence[Tensor] | None,
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
        if not self._matches_largest and self.teacher is None:
            return loss
        if not activations:
            raise ValueError(
                "No layer was watched. Run the forward pass inside watch_layers(model, objective.layers(shape))."
            )
        if largest is not None and self._matches_largest:
            loss = loss + self._loss_to_largest(activations, attention_mask, largest)
        if self.teacher is not None:
            if outside is None:
                raise ValueError("The outside teacher's output is missing. Pass outside=objective.teacher(batch).")
            loss = loss + self._loss_to_outside(activations, attention_mask, outside)
        return loss

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
        self, activations: Mapping[int, LayerActivations], attention_mask: Tensor, outside: Sequence[Tensor]
    ) -> Tensor:
        """Compare the last layer that the shape kept with the layer of the outside teacher."""
        last = activations[max(activations)]
        heads = self.relation_heads or last.num_heads
        return self.teacher_weight * relation_loss((last.query, last.key, last.value), outside, heads, attention_mask)
