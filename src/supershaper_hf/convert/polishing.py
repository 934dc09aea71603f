"""A subnet fitted to its one shape, in closed form: seconds on a CPU, from a little text without labels.

`calibrate` fits what a narrow width of a layer has of its own for all shapes at once, so every layer is fed with the
states of the full supernet. A subnet has one shape. `polish` runs it layer by layer beside the full supernet, and fits
its bottlenecks by ridge regressions on what the layers before them compute. So errors are corrected where they show:

- The bottleneck into a layer should give the code of what the full layer reads, see `SuperShaperCode`.
- The last bottleneck should give the last hidden state of the original.

Each is drawn towards its present value. A part of the text is held out. A bottleneck that is not nearer to its target
there stays as it was, and so does the whole subnet if it is not nearer to the original there.
"""

import copy
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear
from tqdm.auto import tqdm

from ..model.elastic import SuperShaperNarrowWidth
from .calibration import (
    ENCODER_INPUTS,
    TINY,
    Batch,
    Moments,
    assign,
    exact,
    read_text,
    ready_to_measure,
    ridge_regression,
    states_by_layer,
)


# One of so many sequences is held out.
HELD_OUT = 6
# The strengths of the ridge regressions, of which the one that is best on the text held out is taken.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# A gain below this share of the target's energy is rounding.
ROUNDING = 1e-9


class Polished(NamedTuple):
    """How far a subnet is from the original on the text that was held out: `distance` of `evaluate_shapes`."""

    before: float
    after: float


class Tokens(NamedTuple):
    """Which tokens of the text are not padding, and which batches are held out."""

    real: list[torch.Tensor]  # (batch, length) each, booleans
    held_out: int  # number of batches, from the first on; maps are fitted on the others

    def of(self, states: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Return the states of the tokens, (tokens, width) for each batch of states (batch, length, width)."""
        return [state[real] for state, real in zip(states, self.real)]


@torch.no_grad()
def polish(
    subnet: Any,
    supernet: Any,
    shape: Sequence[int],
    batches: Iterable[Batch],
    original: Any = None,
    progress: bool = False,
) -> Polished:
    """Change a subnet in place so that it is nearer to the original, as `extract_subnet(shape, calibration=batches)`.

    About 10,000 tokens are enough. One of six sequences is held out: if the subnet is not nearer to the original there,
    it stays as it was.

    Args:
        subnet: What `supernet.extract_subnet(shape)` has returned. Its encoder is changed, its head is not.
        supernet: The supernet that it was cut from, with any head, on the same device. It is not changed.
        shape: The shape that it was cut at, dropped layers included.
        batches: `input_ids` and, where there is padding, `attention_mask`, (batch, length) each, on any device.
            `token_type_ids` are read too, other entries are not.
        original: The model to come near to: the BERT that the supernet was made of. By default it is the largest shape
            of the supernet, which computes the same unless the weights that all widths share were trained.
        progress: Whether to show a progress bar.

    Returns:
        The distances to the original on the held-out text, before and after.

    Raises:
        ValueError: If the subnet has not this shape, if there are fewer than six sequences or only padding, or if a
            state is not a finite number. The subnet is then as it was.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel
        >>> config = SuperShaperConfig(hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50)
        >>> supernet = SuperShaperModel(config).eval()
        >>> subnet = supernet.extract_subnet([40, 16])
        >>> before, after = polish(subnet, supernet, [40, 16], [{"input_ids": torch.arange(48).view(8, 6)}])
        >>> after <= before
        True
    """
    shape = supernet.config.normalize_shape(shape)
    widths = [width for width in shape if width]
    if not subnet.config.merged_bottlenecks or subnet.config.hidden_sizes != widths:
        raise ValueError(
            f"The model to polish has hidden_sizes={subnet.config.hidden_sizes}, but a subnet of shape={shape} has "
            f"{widths}. Give what supernet.extract_subnet({shape}) has returned."
        )
    original = supernet if original is None else original
    held_out, fitted = divide(batches)
    with ExitStack() as stack:
        for model in (supernet, subnet, original):
            stack.enter_context(ready_to_measure(model))
        text, own_text = (read_text(model, [*held_out, *fitted]) for model in (supernet, subnet))
        tokens = Tokens([batch.real for batch in text], len(held_out))
        target = [last_state(original, batch).to(subnet.device) for batch in [*held_out, *fitted]]
        before = relative_error(tokens.of(last_state(subnet, batch) for batch in held_out), tokens.of(target))

        full, encoder = supernet.base_model.encoder, copy.deepcopy(subnet.base_model.encoder)
        flow, kept = [batch.embeddings for batch in own_text], 0
        states_of_layers = states_by_layer(full, text)
        for index, states in enumerate(tqdm(states_of_layers, "Polishing", len(shape), disable=not progress)):
            if shape[index]:
                codes = [encode(each.inputs, full.narrow(index, shape[index]), shape[index]) for each in states]
                flow = refit(encoder.input_bottleneck[kept], flow, codes, tokens)
                flow = [encoder.layer[kept](state, batch.mask) for state, batch in zip(flow, own_text)]
                kept += 1
        flow = refit(encoder.output_bottleneck[0], flow, target, tokens)
        after = relative_error(tokens.of(flow[: len(held_out)]), tokens.of(target))
        if after < before:
            subnet.base_model.encoder.load_state_dict(encoder.state_dict())
    return Polished(before, min(before, after))


def divide(batches: Iterable[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Divide text into what is held out, one of `HELD_OUT` sequences, and the rest.

    Raises:
        ValueError: If there are too few sequences to hold one out.
    """
    held_out: list[Batch] = []
    fitted: list[Batch] = []
    count = 0
    for batch in batches:
        given = {name: values for name, values in batch.items() if name in ENCODER_INPUTS}
        rows = torch.arange(count, count + len(given["input_ids"])) % HELD_OUT == HELD_OUT - 1
        count += len(rows)
        for part, chosen in ((held_out, rows), (fitted, ~rows)):
            if chosen.any():
                part.append({name: values[chosen.to(values.device)] for name, values in given.items()})
    if not held_out:
        raise ValueError(
            f"There are {count} sequences to polish on, of which one in {HELD_OUT} is held out. Give at least "
            f"{HELD_OUT}; 10,000 tokens or more are useful."
        )
    return held_out, fitted


def last_state(model: Any, batch: Batch) -> torch.Tensor:
    """Return the last hidden state (batch, length, hidden_size) of a model with any head."""
    inputs = {name: values.to(model.device) for name, values in batch.items()}
    return model.base_model(**inputs, return_dict=True).last_hidden_state


def relative_error(states: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> float:
    """Return the squared error of `states`, (tokens, width) each, divided by the spread of as many of `targets`."""
    expected = torch.cat([exact(target) for target in targets[: len(states)]])
    error = (torch.cat([exact(state) for state in states]) - expected).square().sum()
    return float(error / ((expected - expected.mean(dim=0)).square().sum() + TINY))


def encode(states: torch.Tensor, narrow: SuperShaperNarrowWidth | None, width: int) -> torch.Tensor:
    """Return the code (..., w) by which a layer of a supernet stands for `states` (..., hidden_size) at a width."""
    kept, rest = states[..., :width], states[..., width:]
    return kept if narrow is None else kept + linear(rest, narrow.attention_code.writer.weight)


def refit(
    module: nn.Linear, inputs: list[torch.Tensor], targets: list[torch.Tensor], tokens: Tokens
) -> list[torch.Tensor]:
    """Fit a linear map to targets by ridge regression, and return its outputs for each batch of inputs.

    It stays as it was if it is not nearer to the targets on the text that is held out.
    """
    x, y = tokens.of(inputs), tokens.of(targets)
    unseen, wanted = (torch.cat(states[: tokens.held_out]) for states in (x, y))
    moments = Moments.of(zip(x[tokens.held_out :], y[tokens.held_out :]))
    best = start = module.weight.clone(), module.bias.clone()
    least = squared_error(module, unseen, wanted) - ROUNDING * float(exact(wanted).square().sum())
    for strength in STRENGTHS:
        assign(module, ridge_regression(moments, start[0], strength))
        error = squared_error(module, unseen, wanted)
        if error < least:
            least, best = error, (module.weight.clone(), module.bias.clone())
    assign(module, best)
    return [module(state) for state in inputs]


def squared_error(module: nn.Linear, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float(exact(module(inputs) - targets).square().sum())
