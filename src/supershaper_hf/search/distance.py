"""How far a shape is from the original model: what its encoder makes of the same text.

Two figures compare the last hidden states, s of the shape and t of the original, on all tokens that are not padding:

- The distance is `sum |s - t|^2 / sum |t - mean(t)|^2`. It is 0 for the original, and 1 for a guess that is the same
  for every token.
- The cosine is the mean, over the sequences, of the cosine between the two embeddings. The embedding of a sequence is
  the mean of its last hidden states.

So a model without a masked-LM head can be measured too.

The last layer says how well a shape copies the original. Fine-tuning teaches the last layers anew, but it cannot bring
back what the first ones have lost. For a shape that will be fine-tuned, the states of all layers are compared, each
at the width of the full model (`layers="all"`), and the distance is the mean over the layers.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..devices import summing_dtype
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperForMultipleChoice, SuperShaperPreTrainedModel


LAYERS = ("last", "all")  # whose states are compared
INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what an encoder reads of a batch
KEPT_BYTES = 2**30  # memory, over all processes, for states of the original; see `Original`

Batch = dict[str, torch.Tensor]


def check_original(model: SuperShaperPreTrainedModel, original: Any, layers: str) -> None:
    """Raise an error unless the states of `original` can be compared with those of `model`."""
    names = {"hidden_size": "states of another size", "vocab_size": "another tokenizer"}
    if layers == "all":
        names["num_hidden_layers"] = "other layers"
    if not isinstance(original, PreTrainedModel):
        raise TypeError(
            f"original={original!r} is not a model. Load it with AutoModel.from_pretrained, or leave it out to compare "
            "with the largest shape."
        )
    for name, what in names.items():
        expected, found = getattr(model.config, name), getattr(original.config, name)
        if found != expected:
            raise ValueError(
                f"The original has {name}={found}, but the model has {name}={expected}: it has {what}, so the two "
                "cannot be compared. Give the BERT that the supernet was made of, or leave original out to compare "
                "with the largest shape."
            )


def has_masked_lm_head(model: PreTrainedModel) -> bool:
    """Return whether a model predicts masked tokens, so that its masked-LM loss can be measured."""
    return model.get_output_embeddings() is not None


def encode(model: SuperShaperPreTrainedModel, batch: Batch, shape: Any) -> torch.Tensor:
    """Return the last hidden states (batch, length, hidden_size) of a supernet at a shape, whatever head it has.

    The whole model is called, because under FSDP the weights of the encoder are complete only while the whole runs.
    """
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    options: dict[str, Any] = {"shape": shape, "return_dict": True}
    if isinstance(model, SuperShaperForMultipleChoice):
        inputs = {name: tensor[:, None] for name, tensor in inputs.items()}  # each sequence is a single choice
    elif has_masked_lm_head(model):  # without any label, the head has nothing to predict
        options |= {"labels": torch.full_like(inputs["input_ids"], IGNORE_INDEX), "sparse_prediction": True}
    seen = []
    with model.base_model.register_forward_hook(lambda module, given, output: seen.append(output)):
        model(**inputs, **options)
    return seen[0].last_hidden_state


def check_layers(model: SuperShaperPreTrainedModel) -> None:
    """Raise a ValueError unless the states of all layers of a model can be brought to one width."""
    if model.config.merged_bottlenecks:
        raise ValueError(
            f"This is a subnet with hidden_sizes={model.config.hidden_sizes}: the states between its layers have no "
            'other width. Measure its shape in the supernet, or use layers="last".'
        )
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError('layers="all" needs all weights on every process. Measure without FSDP, or layers="last".')


def encode_layers(model: SuperShaperPreTrainedModel, batch: Batch, shape: Any) -> torch.Tensor:
    """Return the states that each layer of a supernet hands on at a shape: (layers, batch, length, hidden_size).

    The output bottleneck of a narrow layer brings them to the width of the full model. A layer that the shape drops
    hands on what it gets.
    """
    encoder: Any = model.base_model.encoder
    embeddings: Any = model.base_model.embeddings
    widths: Any = model.config.hidden_sizes if shape is None else model.config.normalize_shape(shape)
    outputs: dict[int, torch.Tensor] = {}

    with ExitStack() as hooks:
        for number, module in enumerate([embeddings, *encoder.layer]):

            def keep(module: Any, given: Any, output: torch.Tensor, number: int = number) -> None:
                outputs[number] = output

            hooks.enter_context(module.register_forward_hook(keep))
        encode(model, batch, shape)
    states = [outputs[0]]
    for index, width in enumerate(widths):
        states.append(states[-1] if width == 0 else encoder.leave(index, outputs[index + 1]))
    return torch.stack(states[1:])


class Original:
    """The hidden states of the original on one process's share of the batches: of its last layer, or of all.

    States are kept from one shape to the next while those of all batches and processes fit into `KEPT_BYTES`. Those of
    further batches are computed again for every shape, because a small machine may not have the memory.

    Args:
        model: The supernet or subnet that is measured.
        original: The model to compare with, or `None` for the largest shape of `model`.
        share: The batches, on the device of `model`.
        layers: "last" or "all".
        kept: How many of them have states that are kept, the same number on every process.
    """

    def __init__(
        self,
        model: SuperShaperPreTrainedModel,
        original: PreTrainedModel | None,
        share: list[Batch],
        layers: str,
        kept: int,
    ) -> None:
        self.model, self.original, self.share, self.layers, self.kept = model, original, share, layers, kept
        self.states: dict[int, torch.Tensor] = {}

    def encode(self, number: int) -> torch.Tensor:
        """Return the states (layers, batch, length, hidden_size) of a batch of the share."""
        if number in self.states:
            return self.states[number]
        batch = self.share[number]
        if self.original is None:
            states = self.encode_shape(batch, None)
        else:
            states = self.encode_original(batch).to(self.model.device)
        if number < self.kept:
            self.states[number] = states
        return states

    def encode_original(self, batch: Batch) -> torch.Tensor:
        """Return the states of a model that was given as the original."""
        original: Any = self.original
        if self.layers == "all" and isinstance(original, SuperShaperPreTrainedModel):
            check_layers(original)
            return encode_layers(original, {name: tensor.to(original.device) for name, tensor in batch.items()}, None)
        inputs = {name: batch[name].to(original.device) for name in INPUTS if name in batch}
        found = original.base_model(**inputs, output_hidden_states=self.layers == "all", return_dict=True)
        return torch.stack(found.hidden_states[1:] if self.layers == "all" else [found.last_hidden_state])

    def encode_shape(self, batch: Batch, shape: Any) -> torch.Tensor:
        """Return the states (layers, batch, length, hidden_size) of a shape of the model that is measured."""
        if self.layers == "all":
            return encode_layers(self.model, batch, shape)
        return encode(self.model, batch, shape)[None]

    def moments(self) -> torch.Tensor:
        """Return for each batch and layer the sum of the states of its tokens, and the sum of their squares.

        Returns:
            (batches, layers * (hidden_size + 1)), the squares last in each layer.
        """
        rows = []
        for number, batch in enumerate(self.share):
            mask, parts = batch["attention_mask"].bool(), []
            for states in self.encode(number):
                tokens = states[mask].to(summing_dtype(states.device))
                parts += [tokens.sum(0), tokens.square().sum()[None]]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    def compare(self, shape: Any) -> torch.Tensor:
        """Return for each batch the squared errors of the states of its tokens by layer, and the sum of the cosines.

        Returns:
            (batches, layers + 1). The figures stay on the device, so that a GPU need not wait between two batches.
        """
        rows = []
        for number, batch in enumerate(self.share):
            mask = batch["attention_mask"].bool()
            pairs = zip(self.encode_shape(batch, shape), self.encode(number), strict=True)
            figures = torch.stack([compare_states(states, expected, mask) for states, expected in pairs])
            rows.append(torch.cat([figures[:, 0], figures[-1:, 1]]))  # the cosine is that of the last states
        return torch.stack(rows)


def compare_states(states: torch.Tensor, expected: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the squared error of all states that are not padding, and the sum of the cosines of embeddings: (2,).

    Args:
        states: (batch, length, hidden_size).
        expected: (batch, length, hidden_size), the states of the original.
        mask: (batch, length), false for padding. A sequence without any token counts in neither figure.

    Example:
        >>> states = torch.tensor([[[1.0, 0.0], [1.0, 2.0], [9.0, 9.0]]])
        >>> compare_states(states, torch.ones(1, 3, 2), torch.tensor([[True, True, False]])).round(decimals=3)
        tensor([2., 1.], dtype=torch.float64)
    """
    dtype, padding = summing_dtype(states.device), ~mask[..., None]
    states, expected = (each.to(dtype).masked_fill(padding, 0) for each in (states, expected))
    error = (states - expected).square().sum()
    # Of sums, which point where the means do. A sequence without any token has the cosine 0.
    cosines = cosine_similarity(states.sum(1), expected.sum(1), dim=1)
    return torch.stack([error, cosines.sum()])
