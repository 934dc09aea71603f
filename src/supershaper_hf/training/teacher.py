"""An outside teacher: a second model, which does not change, and what it computes of the text that a student reads."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..devices import copy_mapped_weights


# What a layer's query, key and value projections are called in BERT, RoBERTa, ELECTRA and SuperShaper; in DistilBERT;
# and in MPNet. The dot before `attention` leaves out `crossattention`, which decoders have.
PROJECTIONS = (
    (".attention.self.query", ".attention.self.key", ".attention.self.value"),
    (".attention.q_lin", ".attention.k_lin", ".attention.v_lin"),
    (".attention.attn.q", ".attention.attn.k", ".attention.attn.v"),
)


@dataclass(frozen=True)
class TeacherOutput:
    """What an outside teacher computed: `query`, `key`, `value` of the layer that teaches, and its last hidden `state`.

    Each is (batch, length, teacher width).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    state: Tensor


class OutsideTeacher:
    """A second model that teaches every shape: through its attention relations, or through its last hidden state.

    `relation_loss` compares one of its layers with the last layer of a shape. For this it may have any depth and width.
    `state_loss` and `pooled_loss` compare last hidden states, so it needs the student's hidden_size: it is the original
    that the student was made of, or another model of that width.

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
        >>> output = teacher({"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3)})
        >>> output.query.shape, output.state.shape
        (torch.Size([1, 3, 96]), torch.Size([1, 3, 96]))
    """

    def __init__(self, model: PreTrainedModel, layer: int = -1) -> None:
        # The head is left out: for a whole vocabulary at every position it would cost as much as several layers.
        self.model: PreTrainedModel = model.base_model  # type: ignore[assignment]
        self.model.eval().requires_grad_(False)
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
    def __call__(self, batch: Mapping[str, Tensor]) -> TeacherOutput:
        """Return query, key and value of the layer that teaches, and the last hidden state.

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
                self.model.to(batch["input_ids"].device)  # type: ignore[arg-type]
            output = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        finally:
            for handle in handles:
                handle.remove()
        query, key, value = outputs
        return TeacherOutput(query, key, value, output.last_hidden_state)
