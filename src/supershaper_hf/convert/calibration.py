"""A better start for narrow shapes, in closed form: minutes on a CPU, from a little text without labels.

`calibrate` changes a new supernet so that narrow layers lose less. The full supernet computes what it computed before,
to rounding. Every layer is looked at by itself, between two states of the full supernet, so no gradient is needed.

1. `rotate_heads`: within each attention head, the channels are rotated so that the first ones carry most of the scores
   and of the output. So a narrow layer, which keeps the first channels of each head, approximates the full scores.
2. `order_channels`: the hidden channels with the most energy come first, in one order for all layers.
3. `fit_narrow_widths`, for a supernet with `bottlenecks="by_width"`: for each layer and narrow width, ridge regressions
   estimate the channels that the layer lacks from those it has, and the full layer's output from the narrow one's.

The text passes through the full supernet layer by layer. Only the states before and after one layer are in memory.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm

from ..model.elastic import elastic_linear


# The ridge is this share of the mean variance of the inputs of a regression. Dead channels then have weights of 0.
RIDGE = 1e-3
# Added to the spectrum of a head's second moments, as a share of their mean, so that a dead head can be inverted.
JITTER = 1e-8

Batch = Mapping[str, torch.Tensor]


@torch.no_grad()
def calibrate(supernet: Any, batches: Iterable[Batch], progress: bool = False) -> None:
    """Change a new supernet in place so that its narrow shapes compute nearly what it computes at full width.

    Call it once, after `from_bert` and before training; `from_bert(..., calibration=batches)` does so. 20,000 to
    200,000 tokens are enough. The largest shape computes what it computed before, to rounding.

    With `head_slicing="prefix"` the heads are not rotated, because a narrow layer then divides its channels into other
    heads than the full one.

    Args:
        supernet: A supernet with any head. Its bottlenecks are those of a new supernet, or were trained.
        batches: `input_ids` and `attention_mask`, (batch, length) each, on any device; other entries are not used.
            Masked text is fine, but unmasked text is what a sentence encoder reads.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the model is a subnet, if there is no text, or if a state is not a finite number.

    Example:
        >>> from supershaper_hf import SuperShaperConfig, SuperShaperModel
        >>> config = SuperShaperConfig(
        ...     hidden_size=96, num_attention_heads=4, num_hidden_layers=2, vocab_size=50, head_slicing="per_head"
        ... )
        >>> supernet = SuperShaperModel(config).eval()
        >>> ids = torch.arange(48).view(2, 24)
        >>> before = supernet(ids).last_hidden_state
        >>> calibrate(supernet, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
        >>> torch.allclose(supernet(ids).last_hidden_state, before, atol=1e-5)
        True
    """
    config = supernet.config
    if config.merged_bottlenecks:
        raise ValueError(
            f"This is a subnet with fixed hidden_sizes={config.hidden_sizes}: its channels are already cut. Calibrate "
            "the supernet before extract_subnet."
        )
    encoder = supernet.base_model.encoder
    modes = [(module, module.training) for module in supernet.modules()]
    supernet.eval()
    try:
        text = encoder_inputs(supernet, batches)
        steps = len(encoder.layer) * (2 if config.bottlenecks == "by_width" else 1)
        with tqdm(total=steps, desc="Calibrating", disable=not progress) as bar:
            energy = torch.zeros(config.hidden_size, dtype=torch.float64)
            for index, states in enumerate(states_by_layer(encoder, text)):
                energy += measure_energy(states)
                if config.head_slicing == "per_head":
                    rotate_heads(encoder.layer[index], states)
                bar.update()
            config.full_head_scale = config.head_slicing == "per_head"
            order_channels(encoder, energy.argsort(descending=True, stable=True).to(supernet.device))
            if config.bottlenecks == "by_width":
                for index, states in enumerate(states_by_layer(encoder, text)):
                    fit_narrow_widths(encoder, index, states)
                    bar.update()
    finally:
        for module, training in modes:
            module.training = training


# The text, layer by layer


class Text(NamedTuple):
    """One batch as the encoder reads it: the embeddings, the attention's mask, and which tokens are not padding."""

    embeddings: torch.Tensor  # (batch, length, hidden_size)
    mask: torch.Tensor | None
    real: torch.Tensor  # (batch, length), booleans


class States(NamedTuple):
    """What one full-width layer reads and computes on one batch."""

    inputs: torch.Tensor  # (batch, length, hidden_size), after the input bottleneck
    attended: torch.Tensor  # (batch, length, hidden_size), between attention and FFN
    outputs: torch.Tensor  # (batch, length, hidden_size), before the output bottleneck
    mask: torch.Tensor | None
    real: torch.Tensor  # (batch, length), booleans


def encoder_inputs(supernet: Any, batches: Iterable[Batch]) -> list[Text]:
    """Return what the encoder reads for each batch."""
    text: list[Text] = []

    class Stop(Exception):  # noqa: N818 - it is no error: the layers are run one by one later
        pass

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        real = torch.ones(inputs[0].shape[:2], dtype=torch.bool, device=inputs[0].device)
        text.append(Text(inputs[0], inputs[1], real))
        raise Stop

    with supernet.base_model.encoder.register_forward_pre_hook(keep):
        for batch in batches:
            ids, mask = batch["input_ids"].to(supernet.device), batch.get("attention_mask")
            mask = torch.ones_like(ids) if mask is None else mask.to(supernet.device)
            try:
                supernet.base_model(input_ids=ids, attention_mask=mask)
            except Stop:
                text[-1] = text[-1]._replace(real=mask.bool())
    if not text:
        raise ValueError("There is no text to calibrate on. Give at least one batch; 20,000 tokens or more are useful.")
    return text


def states_by_layer(encoder: Any, text: Sequence[Text]) -> Iterator[list[States]]:
    """Run the full-width encoder layer by layer, and yield what each layer reads and computes on every batch.

    Raises:
        ValueError: If a state is not a finite number.
    """
    flow = [batch.embeddings for batch in text]
    full = encoder.config.hidden_size
    for index, layer in enumerate(encoder.layer):
        states = []
        for embeddings, batch in zip(flow, text):
            inputs = encoder.input_bottleneck[index](embeddings)
            attended = layer.attention(inputs, batch.mask)
            outputs = layer.output(layer.intermediate(attended), attended)
            if not outputs[batch.real].isfinite().all():
                raise ValueError(f"The output of layer {index} is not finite. Check the weights of the supernet.")
            states.append(States(inputs, attended, outputs, batch.mask, batch.real))
        flow = [encoder.exit(index, full)(batch.outputs) for batch in states]
        yield states


# Orders and rotations, which the full width does not notice


def measure_energy(states: Sequence[States]) -> torch.Tensor:
    """Return the energy E[x^2] of each hidden channel, (hidden_size,) in float64, added up over the layer's states.

    The energies of each state are divided by their sum, so that each counts alike. A mean counts too, because a narrow
    layer loses the mean of the channels that it drops.
    """
    total = torch.zeros(states[0].inputs.shape[-1], dtype=torch.float64)
    for site in ("inputs", "attended", "outputs"):
        energies = [getattr(batch, site)[batch.real].square().sum(dim=0).double().cpu() for batch in states]
        energy = torch.stack(energies).sum(dim=0)
        total += energy / energy.sum()
    return total


def order_channels(encoder: Any, order: torch.Tensor) -> None:
    """Reorder the hidden channels inside every layer; the bottlenecks undo it, so the outputs stay.

    One order for all layers keeps neighbouring layers together: a narrow layer passes on the channels that a narrow
    next layer reads.
    """
    for entry, layer, exit in zip(encoder.input_bottleneck, encoder.layer, encoder.output_bottleneck):
        attention = layer.attention.self
        for module in (entry, layer.attention.output.dense, layer.attention.output.LayerNorm):
            permute(module, 0, order)
        for module in (layer.output.dense, layer.output.LayerNorm):
            permute(module, 0, order)
        for module in (attention.query, attention.key, attention.value, layer.intermediate.dense, exit):
            permute(module, 1, order)


def permute(module: nn.Linear | nn.LayerNorm, axis: int, order: torch.Tensor) -> None:
    """Reorder the outputs (`axis` 0: rows and bias) or the inputs (`axis` 1: columns) of a module in place."""
    for parameter in (module.weight, module.bias) if axis == 0 else (module.weight,):
        parameter.copy_(parameter.index_select(axis, order))


def rotate_heads(layer: Any, states: Sequence[States]) -> None:
    """Rotate the channels of each attention head so that the first ones carry most, by singular value decompositions.

    Let S_q = L_q L_q^T be the second moments of a head's queries, S_k = L_k L_k^T the covariance of its keys, and
    L_q^T L_k = U S V^T. Then q' = S^.5 U^T L_q^-1 q and k' = S^.5 V^T L_k^-1 k have the same scores q' k' = q k, and
    their first channels approximate the scores best. (The mean of the keys adds the same number to all scores of a
    query, which the softmax does not notice.) The values are rotated in the same way, by W_o L_c = U S V^T with the
    covariance L_c L_c^T of the head's output. The mean of the values passes through the attention, whose weights add
    up to 1, so it moves into the bias of the output map first.
    """
    attention, output = layer.attention.self, layer.attention.output.dense
    queries = Moments.of(elastic_linear(attention.query, b.inputs)[b.real] for b in states)
    keys = Moments.of(elastic_linear(attention.key, b.inputs)[b.real] for b in states)
    contexts = Moments.of(attention(b.inputs, b.mask)[0][b.real] for b in states)

    mean = contexts.mean.to(output.weight)
    output.bias += output.weight @ mean
    attention.value.bias -= mean

    for rows in torch.arange(output.in_features).view(attention.num_heads, -1):
        block = rows[:, None], rows[None, :]
        root_q, root_k = square_root(queries.second[block]), square_root(keys.covariance[block])
        u, scores, v = torch.linalg.svd(root_q.T @ root_k)
        weigh = scores.sqrt()[:, None]
        rotate(attention.query, rows, weigh * (u.T @ torch.linalg.inv(root_q)))
        rotate(attention.key, rows, weigh * (v @ torch.linalg.inv(root_k)))

        root_c = square_root(contexts.covariance[block])
        columns = output.weight[:, rows].double().cpu()
        u, gains, v = torch.linalg.svd(columns @ root_c, full_matrices=False)
        weigh = gains.clamp(min=gains.max() * 1e-6 + 1e-30).sqrt()
        rotate(attention.value, rows, weigh[:, None] * (v @ torch.linalg.inv(root_c)))
        output.weight[:, rows] = (columns @ (root_c @ v.T) / weigh).to(output.weight)


def rotate(projection: nn.Linear, rows: torch.Tensor, rotation: torch.Tensor) -> None:
    """Multiply the outputs `rows` of a linear map by a square matrix, in place."""
    projection.weight[rows] = (rotation @ projection.weight[rows].double().cpu()).to(projection.weight)
    projection.bias[rows] = (rotation @ projection.bias[rows].double().cpu()).to(projection.bias)


def square_root(moments: torch.Tensor) -> torch.Tensor:
    """Return an invertible L with L L^T = `moments`, up to `JITTER`."""
    jitter = JITTER * moments.diagonal().mean() + 1e-30
    return torch.linalg.cholesky(moments + jitter * torch.eye(len(moments), dtype=moments.dtype))


# Regressions for what narrow widths have of their own


class Moments:
    """Mean, second moments and covariance of vectors x, and the covariance of other vectors y with them, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[torch.Tensor] = []  # of x, x x^T, y, y x^T

    @classmethod
    def of(cls, xs: Iterable[torch.Tensor]) -> "Moments":
        moments = cls()
        for x in xs:
            moments.add(x)
        return moments

    def add(self, x: torch.Tensor, y: torch.Tensor | None = None) -> None:
        """Add vectors x, (tokens, inputs), and y, (tokens, outputs)."""
        new = [x.sum(0), x.T @ x] + ([] if y is None else [y.sum(0), y.T @ x])
        new = [total.double().cpu() for total in new]
        self.sums = [old + total for old, total in zip(self.sums, new)] if self.sums else new
        self.count += len(x)

    @property
    def mean(self) -> torch.Tensor:
        return self.sums[0] / self.count

    @property
    def second(self) -> torch.Tensor:
        return self.sums[1] / self.count

    @property
    def covariance(self) -> torch.Tensor:
        return self.second - self.mean.outer(self.mean)

    def regression(self, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight (outputs, inputs) and bias (outputs,) of the ridge regression of y on x.

        The weight is drawn towards `start` instead of towards 0: where x says nothing about y, it stays.
        """
        mean_y = self.sums[2] / self.count
        cross = self.sums[3] / self.count - mean_y.outer(self.mean)
        covariance = self.covariance
        ridge = covariance + (RIDGE * covariance.diagonal().mean() + 1e-30) * torch.eye(len(covariance)).double()
        start = start.double().cpu()
        weight = start + torch.linalg.solve(ridge, (cross - start @ covariance).T).T
        return weight, mean_y - weight @ self.mean


def fit_narrow_widths(encoder: Any, index: int, states: Sequence[States]) -> None:
    """Fit the readers and the output bottleneck of every narrow width of a layer, one after the other."""
    layer, full = encoder.layer[index], encoder.config.hidden_size
    exit = encoder.exit(index, full)
    inputs = Moments.of(batch.inputs[batch.real] for batch in states)
    for width in (encoder.config.width_choices or [])[:-1]:
        narrow = encoder.narrow(index, width)
        # Which channels the layer lacks does not depend on what it computes, so these moments serve every width.
        missing = Moments()
        missing.count = inputs.count
        missing.sums = [
            inputs.sums[0][:width],
            inputs.sums[1][:width, :width],
            inputs.sums[0][width:],
            inputs.sums[1][width:, :width],
        ]
        assign(narrow.attention_reader, *missing.regression(torch.zeros(full - width, width)))

        attended = [layer.attention(b.inputs[..., :width], b.mask, narrow.attention_reader) for b in states]
        missing = Moments()
        for batch, narrowed in zip(states, attended):
            missing.add(narrowed[batch.real], batch.attended[..., width:][batch.real])
        assign(narrow.intermediate_reader, *missing.regression(torch.zeros(full - width, width)))

        outputs = Moments()
        for batch, narrowed in zip(states, attended):
            narrowed = layer.output(layer.intermediate(narrowed, narrow.intermediate_reader), narrowed)
            outputs.add(narrowed[batch.real], exit(batch.outputs[batch.real]))
        assign(narrow.output_bottleneck, *outputs.regression(exit.weight[:, :width]))


def assign(module: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    module.weight.copy_(weight)
    module.bias.copy_(bias)
