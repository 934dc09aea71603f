"""What a shape learns from: the labels, the largest shape of its step, and an outside teacher.

In-place distillation (Yu and Huang, "Universally Slimmable Networks", 2019, section 3.2): the largest shape of a step
is the teacher of the others. In reading order: the recorder that looks into the layers during a forward pass, the
outside teacher, and `Objective`, which adds up the terms of `losses.py`.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from ..model.elastic import SuperShaperEncoder, SuperShaperSelfAttention, elastic_linear
from .losses import alpha_divergence, attention_loss, hidden_state_loss, relation_loss, soft_cross_entropy, split_heads


DIVERGENCES = ("cross_entropy", "alpha")

# Names of a layer's projections: BERT, RoBERTa, ELECTRA, SuperShaper; DistilBERT; MPNet. The dot before `attention`
# keeps the cross-attention of decoders out.
PROJECTIONS = (
    (".attention.self.query", ".attention.self.key", ".attention.self.value"),
    (".attention.q_lin", ".attention.k_lin", ".attention.v_lin"),
    (".attention.attn.q", ".attention.attn.k", ".attention.attn.v"),
)


@dataclass(frozen=True)
class LayerRecord:
    """What one layer computed at width w: `query`, `key`, `value` and its output `state`, (batch, length, w) each.

    Head h of `num_heads` owns the h-th w / num_heads channels of query, key and value, in either head slicing.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    state: Tensor
    num_heads: int

    def detach(self) -> "LayerRecord":
        query, key, value, state = (t.detach() for t in (self.query, self.key, self.value, self.state))
        return LayerRecord(query, key, value, state, self.num_heads)

    def attention(self) -> tuple[Tensor, Tensor]:
        """Return query and key as (batch, num_heads, length, head_size)."""
        return split_heads(self.query, self.num_heads), split_heads(self.key, self.num_heads)


@contextmanager
def record_layers(model: nn.Module, layers: Sequence[int] | None) -> Iterator[dict[int, LayerRecord]]:
    """Record what `layers` compute during one forward pass inside the context; gradients flow through the records.

    A layer that the shape drops is not recorded. Query, key and value are projected a second time, in a hook that runs
    before the layer. There FSDP2 has gathered the layer's parameters; and under gradient checkpointing the hook is
    outside of what backward runs again, by when the hooks are gone.

    Args:
        model: A supernet or subnet, bare or wrapped (DDP, FSDP2).
        layers: Indices of stored layers; `None` or none records nothing.

    Raises:
        ValueError: If `model` contains no SuperShaper encoder.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> model = SuperShaperModel(config)
        >>> with record_layers(model, [0, 1]) as records:
        ...     output = model(torch.tensor([[1, 2, 3]]), shape=[0, 40])
        >>> {layer: record.state.shape for layer, record in records.items()}
        {1: torch.Size([1, 3, 40])}
    """
    records: dict[int, LayerRecord] = {}
    projected: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    handles: list[RemovableHandle] = []

    def watch(index: int, layer: nn.Module) -> None:
        attention = layer.get_submodule("attention.self")
        assert isinstance(attention, SuperShaperSelfAttention)

        def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states = inputs[0]
            query, key, value = (
                elastic_linear(projection, states, states.shape[-1], out_heads=attention.sliced_heads)
                for projection in (attention.query, attention.key, attention.value)
            )
            projected[index] = query, key, value

        def after(_: nn.Module, inputs: tuple[Tensor, ...], state: Tensor) -> None:
            records[index] = LayerRecord(*projected.pop(index), state, attention.num_heads)

        handles.extend((layer.register_forward_pre_hook(before), layer.register_forward_hook(after)))

    if layers:
        encoder = next((module for module in model.modules() if isinstance(module, SuperShaperEncoder)), None)
        if encoder is None:
            raise ValueError(f"{type(model).__name__} has no SuperShaperEncoder. Give a SuperShaper model.")
        for index in layers:
            watch(index, encoder.layer[index])
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


class OutsideTeacher:
    """A model of its own, of any depth and width, that teaches the last layer of every shape by `relation_loss`.

    It is used as it is in memory: frozen, in evaluation mode, in its own dtype. It reads the student's tokens, so it
    must have been trained with the same tokenizer.

    Args:
        model: BERT, RoBERTa, ELECTRA, DistilBERT, MPNet or SuperShaper, with or without a head. It is changed in place.
        layer: Which layer teaches, negative from the end. MiniLMv2 takes the last of base-size teachers and an
            upper-middle one of large teachers.

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
        # The head is not run: over every position and a whole vocabulary it would cost as much as several layers.
        self.model = model.base_model.eval().requires_grad_(False)
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

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value, (batch, length, teacher width) each, of the layer that teaches.

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
    """What the largest shape of a step teaches the others: logits (labelled positions, vocab_size) and records."""

    logits: Tensor
    records: dict[int, LayerRecord]

    @classmethod
    def of(cls, output: MaskedLMOutput, records: Mapping[int, LayerRecord]) -> "Largest":
        """Detach the first pass of a step."""
        assert output.logits is not None
        return cls(output.logits.detach(), {layer: record.detach() for layer, record in records.items()})


@dataclass(frozen=True)
class Objective:
    """What every shape of a step learns from.

    Args:
        distillation_weight: Share of the largest shape's predictions in the loss on labelled positions; 0: labels only,
            1: the largest shape only. The largest shape itself learns from the labels.
        temperature: Of `soft_cross_entropy`.
        divergence: "cross_entropy", or "alpha" for `alpha_divergence`.
        hidden_weight: Factor of `hidden_state_loss` to the largest shape.
        attention_weight: Factor of `attention_loss` to the largest shape.
        teacher: An outside teacher, of the largest shape too.
        teacher_weight: Factor of `relation_loss` to it.
        relation_heads: Of `relation_loss`; `None`: as many as the student has attention heads.

    Raises:
        ValueError: If a value is out of range, or two do not go together.

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
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight={self.distillation_weight} must be between 0 and 1.")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be positive and finite.")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence={self.divergence!r} must be one of {', '.join(DIVERGENCES)}.")
        for name in ("hidden_weight", "attention_weight", "teacher_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more, and finite.")
        if self.relation_heads is not None and self.relation_heads < 1:
            raise ValueError(f"relation_heads={self.relation_heads} must be at least 1, or None.")
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
        return self.distillation_weight > 0 or self._matches_layers

    @property
    def _matches_layers(self) -> bool:
        return self.hidden_weight > 0 or self.attention_weight > 0

    def layers(self, shape: Sequence[int]) -> list[int]:
        """Return the layers to record in a pass at `shape` (one width per layer, 0 where dropped), as few as possible.

        The largest shape keeps every layer, so it records what any other shape is compared with.
        """
        kept = [layer for layer, width in enumerate(shape) if width]
        if self._matches_layers:
            return kept
        return [] if self.teacher is None else kept[-1:]

    def __call__(
        self,
        output: MaskedLMOutput,
        records: Mapping[int, LayerRecord],
        batch: Mapping[str, Tensor],
        largest: Largest | None,
        outside: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Return a mean over labelled positions and a mean over real tokens; their sum is the loss of the shape.

        Args:
            output: Of a pass with labels and `sparse_prediction=True`: logits are (labelled positions, vocab_size).
            records: What `record_layers(model, self.layers(shape))` recorded in that pass.
            batch: Has the `attention_mask`, (batch, length).
            largest: The first pass of the step; `None` in that pass itself.
            outside: What `self.teacher` returned for the batch.

        Raises:
            ValueError: If records or the outside teacher's output are needed and missing.
        """
        assert output.loss is not None
        assert output.logits is not None
        label_loss = output.loss
        # Without labelled positions there is nothing to compare, and a mean would be undefined.
        if largest is not None and self.distillation_weight > 0 and len(output.logits) > 0:
            if self.divergence == "alpha":
                soft = alpha_divergence(output.logits, largest.logits)
            else:
                soft = soft_cross_entropy(output.logits, largest.logits, self.temperature)
            label_loss = (1 - self.distillation_weight) * output.loss + self.distillation_weight * soft

        token_loss = torch.zeros((), device=output.logits.device)
        if (self._matches_layers or self.teacher is not None) and not records:
            raise ValueError(
                "No layer was recorded. Run the pass inside record_layers(model, objective.layers(shape))."
            )
        if largest is not None and self._matches_layers:
            pairs = [(record, largest.records[layer]) for layer, record in records.items()]
            if self.hidden_weight > 0:
                students, teachers = [s.state for s, _ in pairs], [t.state for _, t in pairs]
                token_loss = token_loss + self.hidden_weight * hidden_state_loss(
                    students, teachers, batch["attention_mask"]
                )
            if self.attention_weight > 0:
                token_loss = token_loss + self.attention_weight * attention_loss(
                    [s.attention() for s, _ in pairs], [t.attention() for _, t in pairs], batch["attention_mask"]
                )
        if self.teacher is not None:
            if outside is None:
                raise ValueError("The outside teacher's output is missing. Pass outside=objective.teacher(batch).")
            last = records[max(records)]
            heads = self.relation_heads or last.num_heads
            token_loss = token_loss + self.teacher_weight * relation_loss(
                (last.query, last.key, last.value), outside, heads, batch["attention_mask"]
            )
        return label_loss, token_loss
