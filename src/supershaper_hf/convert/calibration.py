"""A better start for narrow shapes, in closed form: minutes on a CPU, from a little text without labels.

`calibrate` changes a new supernet so that narrow layers lose less. The full supernet computes what it computed before,
to rounding. Every layer is looked at by itself, between two states of the full supernet, so no gradient is needed.

1. `rotate_heads`: within each attention head, the channels are rotated so that the first ones carry most of the scores
   and of the output. So a narrow layer, which keeps the first channels of each head, approximates the full scores.
2. `order_channels`: the hidden channels with the most energy come first, in one order for all layers.
3. `fit_narrow_widths`, for a supernet with `bottlenecks="by_width"`: for each layer and narrow width, a code near the
   principal components is chosen, and ridge regressions estimate the full state from the code, and the full layer's
   output from the narrow one's.

The text passes through the full supernet layer by layer, once to measure what the first two steps need, and once more
for the third. In memory are the embeddings of the text and what one layer computes of it: about six float32 numbers
for each token and hidden channel.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.masking_utils import create_bidirectional_mask


# The strength of a ridge regression, as a share of the mean variance of its inputs.
RIDGE = 1e-3
# How strongly the writer of a code is drawn towards 0. On a 6-layer encoder of 384 channels, 0.1 was better for wide
# layers and 1 for narrow ones.
WRITER_PENALTY = 0.3
# Directions in which a head hardly varies count as if they had this share of its energy, so that they can be scaled.
SMALLEST_SHARE = 1e-8
# Added to what may be 0, where a head or a channel computes nothing.
TINY = 1e-30

ENCODER_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
Batch = Mapping[str, torch.Tensor]


@torch.no_grad()
def calibrate(supernet: Any, batches: Iterable[Batch], progress: bool = False) -> None:
    """Change a new supernet in place so that its narrow shapes compute nearly what it computes at full width.

    Call it once, after `from_bert` and before training; `from_bert(..., calibration=batches)` does so. 20,000 to
    200,000 tokens are enough. The largest shape computes what it computed before, to rounding: where the supernet is in
    float16 or bfloat16, its weights are calibrated in float32 and rounded at the end.

    With `head_slicing="prefix"` the heads are not rotated, because a narrow layer then divides its channels into other
    heads than the full one.

    Args:
        supernet: A supernet with any head. Its bottlenecks are those of a new supernet, or were trained.
        batches: `input_ids` and, where there is padding, `attention_mask`, (batch, length) each, on any device.
            `token_type_ids` are read too, other entries are not. Unmasked text is what a sentence encoder reads.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the model is a subnet, if there is no text, or if a state is not a finite number. The model is
            then as it was.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel
        >>> config = SuperShaperConfig(
        ...     hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50, head_slicing="per_head"
        ... )
        >>> supernet = SuperShaperModel(config).eval()
        >>> ids = torch.arange(48).view(2, 24)
        >>> before = supernet(ids).last_hidden_state
        >>> calibrate(supernet, [{"input_ids": ids}])
        >>> torch.allclose(supernet(ids).last_hidden_state, before, atol=1e-5)
        True
    """
    config, encoder = supernet.config, supernet.base_model.encoder
    if config.merged_bottlenecks:
        raise ValueError(
            f"This is a subnet with fixed hidden_sizes={config.hidden_sizes}: its channels are already cut. Calibrate "
            "the supernet before extract_subnet."
        )
    per_head, by_width = config.head_slicing == "per_head", config.bottlenecks == "by_width"
    steps = len(encoder.layer) * (2 if by_width else 1)
    with ready_to_measure(supernet), tqdm(total=steps, desc="Calibrating", disable=not progress) as bar:
        text = read_text(supernet, batches)
        # All is measured before anything is changed: an error leaves the supernet as it was.
        energy = torch.zeros(config.hidden_size, dtype=torch.float64)
        heads = []
        for layer, states in zip(encoder.layer, states_by_layer(encoder, text)):
            energy += measure_energy(states)
            if per_head:
                heads.append(measure_heads(layer.attention.self, states))
            bar.update()

        for layer, measured in zip(encoder.layer, heads):
            rotate_heads(layer.attention, measured)
        if per_head:
            config.full_head_scale = True  # the first channels of a head approximate the scores of the full head
        order_channels(encoder, energy.argsort(descending=True, stable=True).to(supernet.device))

        if by_width:
            for index, states in enumerate(states_by_layer(encoder, text)):
                fit_narrow_widths(encoder, index, states)
                bar.update()


# The text, layer by layer


class Text(NamedTuple):
    """One batch as the encoder reads it."""

    embeddings: torch.Tensor  # (batch, length, hidden_size)
    mask: Any  # as the implementation of the attention takes it
    real: torch.Tensor  # (batch, length), booleans: which tokens are not padding


class States(NamedTuple):
    """What one layer reads and computes on one batch at full width; the states are (batch, length, hidden_size)."""

    inputs: torch.Tensor  # after the input bottleneck
    attended: torch.Tensor  # between attention and FFN
    outputs: torch.Tensor  # before the output bottleneck
    mask: Any
    real: torch.Tensor


@contextmanager
def ready_to_measure(supernet: Any) -> Iterator[None]:
    """Put a supernet into evaluation mode and at least float32, and afterwards back into what it was."""
    modes, dtype = [(module, module.training) for module in supernet.modules()], supernet.dtype
    supernet.eval().to(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        supernet.to(dtype)
        for module, training in modes:
            module.training = training


def read_text(supernet: Any, batches: Iterable[Batch]) -> list[Text]:
    """Return what the encoder reads of each batch.

    Raises:
        ValueError: If there is no token.
    """
    text = []
    for batch in batches:
        given = {name: values.to(supernet.device) for name, values in batch.items() if name in ENCODER_INPUTS}
        ids = given["input_ids"]
        attention_mask = given.get("attention_mask", torch.ones_like(ids))
        embeddings = supernet.base_model.embeddings(ids, given.get("token_type_ids"), None, None)
        mask = create_bidirectional_mask(supernet.config, embeddings, attention_mask)
        text.append(Text(embeddings, mask, attention_mask.bool()))
    if not any(batch.real.any() for batch in text):
        raise ValueError("There is no text to calibrate on. Give at least one batch; 20,000 tokens or more are useful.")
    return text


def states_by_layer(encoder: Any, text: Sequence[Text]) -> Iterator[list[States]]:
    """Run the encoder at full width layer by layer, and yield what each layer reads and computes on every batch.

    A list is emptied when the next one is asked for, so that the states of one layer only are in memory.

    Raises:
        ValueError: If a state is not a finite number.
    """
    flow = [batch.embeddings for batch in text]  # between the layers
    for index, layer in enumerate(encoder.layer):
        states = []
        for position, batch in enumerate(text):
            inputs = encoder.input_bottleneck[index](flow[position])
            attended = layer.attention(inputs, batch.mask)
            outputs = layer.output(layer.intermediate(attended), attended)
            states.append(States(inputs, attended, outputs, batch.mask, batch.real))
            flow[position] = encoder.output_bottleneck[index](outputs)
            if not flow[position][batch.real].isfinite().all():
                raise ValueError(f"The output of layer {index + 1} is not finite. Check the weights of the supernet.")
        yield states
        states.clear()


def add_up(terms: Iterable[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """Add up the tensors of each batch over the batches."""
    totals: list[torch.Tensor] = []
    for new in terms:
        totals = [total + tensor for total, tensor in zip(totals, new)] if totals else list(new)
    return totals


def exact(states: torch.Tensor) -> torch.Tensor:
    """Return `states` in float64 on the CPU. A covariance in float32 loses its digits where means are large."""
    return states.cpu().double()


# One order of the hidden channels


def measure_energy(states: Sequence[States]) -> torch.Tensor:
    """Return the energy E[x^2] of each hidden channel, (hidden_size,), added up over the states of a layer.

    The energies of each state are divided by their sum, so that each state counts alike. A mean counts too, because a
    narrow layer loses the mean of the channels that it drops.
    """
    total = torch.zeros(states[0].inputs.shape[-1], dtype=torch.float64)
    for state in ("inputs", "attended", "outputs"):
        [energy] = add_up([exact(getattr(batch, state)[batch.real]).square().sum(dim=0)] for batch in states)
        total += energy / (energy.sum() + TINY)
    return total


def order_channels(encoder: Any, order: torch.Tensor) -> None:
    """Reorder the hidden channels inside every layer; the bottlenecks undo it, so the full width does not notice.

    One order for all layers keeps neighbouring layers together: a narrow layer passes on the channels that a narrow
    next layer reads.
    """
    for entry, layer, exit in zip(encoder.input_bottleneck, encoder.layer, encoder.output_bottleneck):
        attention = layer.attention
        for module in (entry, attention.output.dense, attention.output.LayerNorm):
            permute(module, 0, order)
        for module in (layer.output.dense, layer.output.LayerNorm):
            permute(module, 0, order)
        for module in (attention.self.query, attention.self.key, attention.self.value, layer.intermediate.dense, exit):
            permute(module, 1, order)


def permute(module: nn.Linear | nn.LayerNorm, axis: int, order: torch.Tensor) -> None:
    """Reorder the outputs (`axis` 0: rows and bias) or the inputs (`axis` 1: columns) of a module in place."""
    for parameter in (module.weight, module.bias) if axis == 0 else (module.weight,):
        parameter.copy_(parameter.index_select(axis, order))


# Rotations inside the heads


class HeadMoments(NamedTuple):
    """Moments of the vectors of each head, in float64."""

    mean: torch.Tensor  # (heads, head_size)
    second: torch.Tensor  # E[x x^T], (heads, head_size, head_size)

    @classmethod
    def of(cls, vectors: Iterable[torch.Tensor], num_heads: int) -> "HeadMoments":
        """Return the moments of `vectors`, (tokens, hidden_size) each."""
        heads = (
            exact(vector).unflatten(1, (num_heads, -1)).transpose(0, 1) for vector in vectors
        )  # (heads, tokens, size)
        count, sums, products = add_up((torch.tensor(x.shape[1]), x.sum(dim=1), x.mT @ x) for x in heads)
        return cls(sums / count, products / count)

    @property
    def covariance(self) -> torch.Tensor:
        return self.second - self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def energy(self) -> torch.Tensor:
        """E[x^2] of each head, (heads,), as a mean over its channels."""
        return self.second.diagonal(dim1=1, dim2=2).mean(dim=1)


class MeasuredHeads(NamedTuple):
    """What the attention of a layer computes: queries and keys, and contexts, which are weighted means of values."""

    queries: HeadMoments
    keys: HeadMoments
    contexts: HeadMoments


def measure_heads(attention: Any, states: Sequence[States]) -> MeasuredHeads:
    """Measure the heads of a layer's self-attention."""
    queries = (attention.query(batch.inputs)[batch.real] for batch in states)
    keys = (attention.key(batch.inputs)[batch.real] for batch in states)
    contexts = (attention(batch.inputs, batch.mask)[0][batch.real] for batch in states)
    return MeasuredHeads(*(HeadMoments.of(vectors, attention.num_heads) for vectors in (queries, keys, contexts)))


def rotate_heads(attention: Any, measured: MeasuredHeads) -> None:
    """Rotate the channels of each attention head so that the first ones carry most; the full width does not notice.

    For the scores, let S_q = L_q L_q^T be the second moments of a head's queries, S_k = L_k L_k^T the covariance of its
    keys, and L_q^T L_k = U S V^T. Then q' = S^.5 U^T L_q^-1 q and k' = S^.5 V^T L_k^-1 k have the same scores
    q' k' = q k, and their first channels approximate the scores best. (The mean of the keys adds the same number to all
    scores of a query, which the softmax does not notice.)

    For the output, let C = L_c L_c^T be the covariance of the head's contexts, W_o its columns of the output map, and
    W_o L_c = U S V^T. Then v' = S^.5 V^T L_c^-1 v and W_o' = U S^.5 give the same output. The mean of the contexts
    passes through the attention unchanged, because its weights add up to 1. So it first moves from the bias of the
    values into the bias of the output map, where a narrow layer keeps it.
    """
    projections, output = attention.self, attention.output.dense
    mean = measured.contexts.mean.flatten().to(output.weight)
    output.bias += output.weight @ mean
    projections.value.bias -= mean

    root_q, inverse_q = square_root(measured.queries.second, measured.queries.energy)
    root_k, inverse_k = square_root(measured.keys.covariance, measured.keys.energy)
    u, scores, v_transposed = torch.linalg.svd(root_q.mT @ root_k)
    scale = scores.sqrt()[:, :, None]
    rotate(projections.query, scale * (u.mT @ inverse_q))
    rotate(projections.key, scale * (v_transposed @ inverse_k))

    root_c, inverse_c = square_root(measured.contexts.covariance, measured.contexts.energy)
    columns = exact(output.weight).unflatten(1, (projections.num_heads, -1)).transpose(0, 1)
    _, gains, v_transposed = torch.linalg.svd(columns @ root_c, full_matrices=False)
    scale = (gains.clamp(min=1e-6 * gains.max()) + TINY).sqrt()  # columns are divided by it
    rotate(projections.value, scale[:, :, None] * (v_transposed @ inverse_c))
    columns = columns @ root_c @ v_transposed.mT / scale[:, None, :]
    output.weight.copy_(columns.transpose(0, 1).flatten(1))


def square_root(moments: torch.Tensor, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L with L L^T = `moments`, and its inverse, for each head.

    Eigenvalues that are 0, or negative by rounding, are raised to a small share of the energy of the head.
    """
    values, vectors = torch.linalg.eigh(moments)
    roots = torch.maximum(values, SMALLEST_SHARE * energy[:, None] + TINY).sqrt()
    return vectors * roots[:, None, :], vectors.mT / roots[:, :, None]


def rotate(projection: nn.Linear, rotations: torch.Tensor) -> None:
    """Multiply the outputs of each head of a linear map by a matrix (head_size, head_size), in place."""
    for parameter in (projection.weight, projection.bias):
        heads = exact(parameter).reshape(*rotations.shape[:2], -1)
        parameter.copy_((rotations @ heads).reshape(parameter.shape))


# Regressions for what narrow widths have of their own


class Moments(NamedTuple):
    """Means and covariances of inputs x and targets y, in float64."""

    mean_x: torch.Tensor  # (inputs,)
    mean_y: torch.Tensor  # (outputs,)
    covariance_xx: torch.Tensor  # (inputs, inputs)
    covariance_yx: torch.Tensor  # (outputs, inputs)

    @classmethod
    def of(cls, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> "Moments":
        """Return the moments of pairs of x, (tokens, inputs), and y, (tokens, outputs)."""
        pairs = ((exact(x), exact(y)) for x, y in pairs)
        count, *sums = add_up((torch.tensor(len(x)), x.sum(dim=0), y.sum(dim=0), x.T @ x, y.T @ x) for x, y in pairs)
        mean_x, mean_y, second_xx, second_yx = (total / count for total in sums)
        return cls(mean_x, mean_y, second_xx - mean_x.outer(mean_x), second_yx - mean_y.outer(mean_x))

    def coded(self, coding: torch.Tensor) -> "Moments":
        """Return the moments of the code z = coding x as inputs, and of the channels of x beyond the code as targets.

        Args:
            coding: (w, inputs).
        """
        coding, width = exact(coding), len(coding)
        mean, covariance = self.mean_x, self.covariance_xx @ coding.T
        return Moments(coding @ mean, mean[width:], coding @ covariance, covariance[width:])


def ridge_regression(
    moments: Moments, start: torch.Tensor | float, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight (outputs, inputs) and bias (outputs,) of the ridge regression of y on x.

    The weight is drawn towards `start`: where x says nothing about y, it stays.
    """
    mean_x, mean_y, covariance_xx, covariance_yx = moments
    # The second term is above the rounding errors of the covariance. It matters only where x does not vary.
    strength = ridge * covariance_xx.diagonal().mean().clamp(min=0) + 1e-12 * mean_x.square().mean() + TINY
    penalised = covariance_xx + strength * torch.eye(len(mean_x), dtype=mean_x.dtype)
    start = torch.zeros_like(covariance_yx) + (exact(start) if isinstance(start, torch.Tensor) else start)
    weight = start + torch.linalg.solve(penalised, (covariance_yx - start @ covariance_xx).T).T
    return weight, mean_y - weight @ mean_x


def fit_narrow_widths(encoder: Any, index: int, states: Sequence[States]) -> None:
    """Fit the codes and the output bottleneck of every narrow width of a layer, one after the other.

    The narrow layer reads the code of what the full layer reads, so it does not depend on other layers.
    """
    layer, exit = encoder.layer[index], encoder.output_bottleneck[index]
    gains = safe_gains(layer.attention.output.LayerNorm)
    inputs = Moments.of((batch.inputs[batch.real],) * 2 for batch in states)
    attended = Moments.of((batch.attended[batch.real] / gains,) * 2 for batch in states)
    # One code has to serve the attention's input and, but for the gains of its LayerNorm, its output.
    covariances = [moments.covariance_xx / (moments.covariance_xx.trace() + TINY) for moments in (inputs, attended)]
    components = torch.linalg.eigh(covariances[0] + covariances[1]).eigenvectors.flip(1)  # the principal ones first
    identity, zeros = torch.eye(len(gains)).to(gains), torch.zeros(len(gains)).to(gains)
    for width in encoder.config.width_choices[:-1]:
        narrow = encoder.narrow(index, width)
        code, next_code = narrow.attention_code, narrow.intermediate_code
        code.writer.weight.copy_(choose_writer(components[:, :width]))
        # The LayerNorm multiplies each channel by its gain, so z = x_kept + S x_rest becomes g_kept z.
        next_code.writer.weight.copy_(gains[:width, None] * code.writer.weight / gains[None, width:])

        coding, _ = code.write(identity, zeros)  # (w, hidden_size): the code of x is z = coding x
        assign(code.reader, ridge_regression(inputs.coded(coding), 0))
        coded = [layer.attention(b.inputs @ coding.T, b.mask, narrow) for b in states]
        pairs = ((z[b.real], b.attended[b.real][:, width:]) for z, b in zip(coded, states))
        assign(next_code.reader, ridge_regression(Moments.of(pairs), 0))
        outputs = (layer.output(layer.intermediate(z, next_code), z, code=next_code) for z in coded)
        pairs = ((z[b.real], exit(b.outputs[b.real])) for z, b in zip(outputs, states))
        assign(narrow.output_bottleneck, ridge_regression(Moments.of(pairs), exit.weight[:, :width]))


def choose_writer(components: torch.Tensor) -> torch.Tensor:
    """Return the S of a code z = x_kept + S x_rest, (w, hidden_size - w), that keeps most of the variance of x.

    The best linear code keeps the first principal components. Any w combinations of them keep as much, and those that
    begin with the kept channels themselves are V_kept^-1 V_rest, where V = [V_kept, V_rest] are the components. A small
    S keeps the code near the channels that the weights and the LayerNorms of the layer were made for, so S is
    penalised: more for narrow widths, whose components are far from the kept channels.

    Args:
        components: The first w principal components of x, (hidden_size, w).
    """
    full, width = components.shape
    kept, rest = components[:width], components[width:]
    penalty = WRITER_PENALTY * full / width * torch.eye(width, dtype=components.dtype)
    return torch.linalg.solve(kept @ kept.T + penalty, kept @ rest.T)


def safe_gains(norm: nn.LayerNorm) -> torch.Tensor:
    """Return the gains of a LayerNorm to divide by: a gain near 0 counts as a tenth of the mean gain."""
    least = 0.1 * norm.weight.abs().mean() + TINY
    return torch.where(norm.weight.abs() < least, torch.copysign(least, norm.weight), norm.weight)


def assign(module: nn.Linear, values: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Copy a weight and a bias into a linear map."""
    module.weight.copy_(values[0])
    module.bias.copy_(values[1])
