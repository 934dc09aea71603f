"""How far a shape is from the original model: what its encoder makes of the same text.

Two figures compare the last hidden states, s of the shape and t of the original, on all tokens that are not padding:

- The distance is `sum |s - t|^2 / sum |t - mean(t)|^2`. It is 0 for the original, and 1 for a guess that is the same
  for every token.
- The cosine is the mean, over the sequences, of the cosine between the two embeddings. The embedding of a sequence is
  the mean of its last hidden states.

So a model without a masked-LM head can be measured too.
"""

from typing import Any

import torch
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from ..devices import summing_dtype
from ..model.modeling_supershaper import IGNORE_INDEX, SuperShaperForMultipleChoice, SuperShaperPreTrainedModel


INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what an encoder reads of a batch
KEPT_BYTES = 2**30  # memory, over all processes, for states of the original; see `Original`

Batch = dict[str, torch.Tensor]


def check_original(model: SuperShaperPreTrainedModel, original: Any) -> None:
    """Raise an error unless the states of `original` can be compared with those of `model`."""
    if not isinstance(original, PreTrainedModel):
        raise TypeError(
            f"original={original!r} is not a model. Load it with AutoModel.from_pretrained, or leave it out to compare "
            "with the largest shape."
        )
    for name, what in (("hidden_size", "states of another size"), ("vocab_size", "another tokenizer")):
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


class Original:
    """The last hidden states of the original on one process's share of the batches.

    States are kept from one shape to the next while those of all batches and processes fit into `KEPT_BYTES`. Those of
    further batches are computed again for every shape, because a small machine may not have the memory.

    Args:
        model: The supernet or subnet that is measured.
        original: The model to compare with, or `None` for the largest shape of `model`.
        share: The batches, on the device of `model`.
        kept: How many of them have states that are kept, the same number on every process.
    """

    def __init__(
        self, model: SuperShaperPreTrainedModel, original: PreTrainedModel | None, share: list[Batch], kept: int
    ) -> None:
        self.model, self.original, self.share, self.kept = model, original, share, kept
        self.states: dict[int, torch.Tensor] = {}

    def encode(self, number: int) -> torch.Tensor:
        """Return the states (batch, length, hidden_size) of a batch of the share."""
        if number in self.states:
            return self.states[number]
        batch = self.share[number]
        if self.original is None:
            states = encode(self.model, batch, None)
        else:
            inputs = {name: batch[name].to(self.original.device) for name in INPUTS if name in batch}
            states = self.original.base_model(**inputs, return_dict=True).last_hidden_state.to(self.model.device)
        if number < self.kept:
            self.states[number] = states
        return states

    def moments(self) -> torch.Tensor:
        """Return for each batch the sum of the states of its tokens, and the sum of their squares.

        Returns:
            (batches, hidden_size + 1), the squares last.
        """
        rows = []
        for number, batch in enumerate(self.share):
            tokens = self.encode(number)[batch["attention_mask"].bool()]
            tokens = tokens.to(summing_dtype(tokens.device))
            rows.append(torch.cat([tokens.sum(0), tokens.square().sum()[None]]))
        return torch.stack(rows)

    def compare(self, shape: Any) -> torch.Tensor:
        """Return for each batch the squared error of the states of its tokens, and the sum of the cosines.

        Returns:
            (batches, 2). The figures stay on the device, so that a GPU need not wait between two batches.
        """
        return torch.stack(
            [
                compare_states(encode(self.model, batch, shape), self.encode(number), batch["attention_mask"].bool())
                for number, batch in enumerate(self.share)
            ]
        )


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
