"""Losses that compare a student with a teacher: predictions, hidden states, attention, and attention relations.

Each loss is a mean over positions: labelled ones for predictions, sequences for pooled states, all tokens but padding
for the others. It is computed in float32, and gradients flow into the student only. `distillation.py` says which shape
or model teaches which.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


# The attention score of padding, whose probability is then exactly 0. With -inf, a divergence would be 0 * (inf - inf).
EXCLUDED = -1e30


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean cross-entropy between the distributions of teacher and student, in nats.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.

    Args:
        student_logits: (positions, vocab_size).
        teacher_logits: (positions, vocab_size).
        temperature: Both logits are divided by it. The loss is multiplied by its square, so that gradients have the
            same size at every temperature.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> round(soft_cross_entropy(logits, logits).item(), 4)  # the entropy of softmax([2, 0])
        0.3653
    """
    teacher = functional.softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return functional.cross_entropy(student_logits.float() / temperature, teacher) * temperature**2


def alpha_divergence(
    student_logits: Tensor, teacher_logits: Tensor, alpha_min: float = -1.0, alpha_max: float = 1.0, clip: float = 5.0
) -> Tensor:
    """Return the mean over positions of the larger of two alpha-divergences between teacher p and student q.

    The divergence is D_alpha(p || q) = sum_i q_i ((p_i / q_i)^alpha - 1) / (alpha (alpha - 1)). Its limit is KL(q || p)
    for alpha = 0, and KL(p || q) for alpha = 1. With a negative alpha it is large where the student is sure and the
    teacher is not, with a positive alpha where the teacher is sure and the student is not. Source: AlphaNet (Wang et
    al., 2021, arXiv 2102.07954), section 3.

    The importances (p_i / q_i)^alpha are clipped. The gradient is the estimate of the paper,
    -1 / alpha sum_i q_i min((p_i / q_i)^alpha, clip) d log q_i, which is exact where nothing is clipped. As in the
    authors' code, nothing is clipped for alpha = 0 and alpha = 1.

    Args:
        student_logits: (positions, vocab_size).
        teacher_logits: (positions, vocab_size).
        alpha_min: The first alpha.
        alpha_max: The second alpha.
        clip: Largest value of an importance, at least 1.

    Example:
        >>> unsure, sure = torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log()
        >>> round(alpha_divergence(unsure, sure).item(), 4)  # alpha = -1: (1/4 / (3/4) + 1/4 / (1/4) - 1) / 2
        0.1667
    """
    student = functional.log_softmax(student_logits.float(), dim=-1)
    teacher = functional.log_softmax(teacher_logits.detach().float(), dim=-1)
    low, low_weights = _divergence(student.detach(), teacher, alpha_min, clip)
    high, high_weights = _divergence(student.detach(), teacher, alpha_max, clip)
    weights = torch.where((low > high).unsqueeze(-1), low_weights, high_weights)
    surrogate = -(weights * student).sum(dim=-1)
    return (surrogate + (torch.maximum(low, high) - surrogate).detach()).mean()


def _divergence(student: Tensor, teacher: Tensor, alpha: float, clip: float) -> tuple[Tensor, Tensor]:
    """Return D_alpha, (positions,), and weights, (positions, vocab_size), with gradient -sum_i weight_i d log q_i.

    Let f(r) = (r^alpha - 1) / (alpha (alpha - 1)) and r = p / q. The derivative of q f(p / q) with respect to q is
    f(r) - r f'(r) = -r^alpha / alpha + constant. The constant does not matter, because sum_i q_i d log q_i is 0. The
    arguments are log-probabilities: a ratio of probabilities would be 0 / 0 where both are too small for float32.
    """
    ratio = teacher - student
    if abs(alpha) < 1e-3:
        return -(student.exp() * ratio).sum(dim=-1), student.exp() * ratio
    if abs(alpha - 1) < 1e-3:
        return (teacher.exp() * ratio).sum(dim=-1), teacher.exp()
    weights = (student + (alpha * ratio).clamp(max=math.log(clip))).exp()
    return (weights.sum(dim=-1) - 1) / (alpha * (alpha - 1)), weights / alpha


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Return the mean squared error between the outputs of layers, as in TinyBERT (arXiv 1909.10351, section 3.1).

    TinyBERT learns a projection between the two widths. Here none is needed, because a narrow layer works on the first
    channels of the full layer.

    Args:
        student: Output of each layer that the student kept, (batch, length, w).
        teacher: Outputs of the same layers, (batch, length, W) with W >= w.
        attention_mask: (batch, length), 0 for padding.

    Returns:
        The mean over channels, tokens that are not padding, and layers.

    Example:
        >>> hidden_state_loss([torch.zeros(1, 1, 2)], [torch.tensor([[[1.0, 3.0, 9.0]]])], torch.ones(1, 1)).item()
        5.0
    """
    losses = [
        _token_mean((s.float() - t.detach()[..., : s.shape[-1]].float()).square().mean(dim=-1), attention_mask)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def state_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the relative squared error |s - t|^2 / |t|^2 of the last hidden state, a mean over tokens.

    It is 0 for equal states, and 1 for a student that returns zeros. So it means the same for models of any width whose
    states have any length.

    Args:
        student: (batch, length, hidden_size).
        teacher: (batch, length, hidden_size).
        attention_mask: (batch, length), 0 for padding, which does not count.

    Example:
        >>> student, teacher = torch.tensor([[[3.0, 3.0]]]), torch.tensor([[[3.0, 4.0]]])
        >>> round(state_loss(student, teacher, torch.ones(1, 1)).item(), 4)  # 1 / 25
        0.04
    """
    teacher = teacher.detach().float()
    errors = (student.float() - teacher).square().sum(dim=-1) / teacher.square().sum(dim=-1)
    return _token_mean(errors, attention_mask)


def pooled_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor, pooling: str = "mean") -> Tensor:
    """Return 1 - cosine between the pooled last hidden states, a mean over sequences.

    Args:
        student: (batch, length, hidden_size).
        teacher: (batch, length, hidden_size).
        attention_mask: (batch, length), 0 for padding.
        pooling: See `pool`.

    Example:
        >>> student, teacher = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[3.0, 4.0]]])
        >>> round(pooled_loss(student, teacher, torch.ones(1, 1)).item(), 4)  # 1 - 3 / 5
        0.4
    """
    pooled = pool(student, attention_mask, pooling), pool(teacher.detach(), attention_mask, pooling)
    return (1 - functional.cosine_similarity(*pooled, dim=-1)).mean()


def pool(states: Tensor, attention_mask: Tensor, pooling: str) -> Tensor:
    """Return one vector for each sequence, (batch, hidden_size), in float32.

    Args:
        states: (batch, length, hidden_size).
        attention_mask: (batch, length), 0 for padding.
        pooling: `"mean"` over the tokens that are not padding, or `"cls"` for the first token.

    Example:
        >>> pool(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]]), "mean").tolist()
        [[2.0]]
    """
    if pooling == "cls":
        return states[:, 0].float()
    real = (attention_mask != 0).unsqueeze(-1)
    return states.float().masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def attention_loss(
    student: Sequence[tuple[Tensor, Tensor]], teacher: Sequence[tuple[Tensor, Tensor]], attention_mask: Tensor
) -> Tensor:
    """Return KL(teacher || student) between the attention distributions softmax(q k^T / sqrt(head size)), in nats.

    TinyBERT compares the scores before the softmax. Distributions can be compared even where heads differ in size.

    Args:
        student: Query and key of each layer that the student kept, (batch, heads, length, head_size) each.
        teacher: Query and key of the same layers, with as many heads. Their size may differ.
        attention_mask: (batch, length), 0 for padding. Tokens do not attend to padding, and queries of padding do not
            count.

    Returns:
        The mean over heads, query tokens that are not padding, and layers.

    Example:
        >>> sure, unsure = torch.tensor([[[[1e3], [0.0]]]]), torch.zeros(1, 1, 2, 1)
        >>> loss = attention_loss([(unsure, sure)], [(sure, sure)], torch.ones(1, 2))
        >>> round(loss.item(), 4)  # log 2 for the first token, 0 for the second
        0.3466
    """
    losses = [
        _relation_divergence(student_pair, teacher_pair, attention_mask)
        for student_pair, teacher_pair in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def relation_loss(
    student_qkv: Sequence[Tensor], teacher_qkv: Sequence[Tensor], relation_heads: int, attention_mask: Tensor
) -> Tensor:
    """Return KL(teacher || student) between self-attention relations, in nats.

    This is the loss of MiniLMv2 (arXiv 2012.15828, section 3.1). The relations of the queries are
    softmax(q q^T / sqrt(head size)), after a split into `relation_heads` heads. Those of the keys and of the values
    are defined in the same way.

    Args:
        student_qkv: Query, key and value of one layer of the student, (batch, length, width) each.
        teacher_qkv: Query, key and value of one layer of the teacher. Their width may differ.
        relation_heads: Number of heads. It must divide both widths.
        attention_mask: (batch, length), 0 for padding.

    Returns:
        The mean over heads and tokens that are not padding, added up over query, key and value as in the paper.

    Raises:
        ValueError: If `relation_heads` does not divide a width.

    Example:
        >>> qkv = [torch.zeros(1, 3, 8)] * 3
        >>> relation_loss(qkv, [torch.ones(1, 3, 4)] * 3, 2, torch.ones(1, 3)).item()  # all tokens alike in both
        0.0
    """
    widths = student_qkv[0].shape[-1], teacher_qkv[0].shape[-1]
    if relation_heads < 1 or any(width % relation_heads for width in widths):
        raise ValueError(
            f"relation_heads={relation_heads} must divide the width of the student's layer, {widths[0]}, and of the "
            f"teacher's, {widths[1]}. Use a divisor of {math.gcd(*widths)}."
        )
    losses = []
    for student, teacher in zip(student_qkv, teacher_qkv, strict=True):
        s, t = split_heads(student, relation_heads), split_heads(teacher, relation_heads)
        losses.append(_relation_divergence((s, s), (t, t), attention_mask))
    return torch.stack(losses).sum()


def split_heads(tensor: Tensor, heads: int) -> Tensor:
    """Return (batch, length, width) as (batch, heads, length, width / heads)."""
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def _token_mean(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean of `values`, (batch, length), over the tokens that are not padding; 0 if there are none."""
    real = attention_mask != 0
    return values.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


def _relation_divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Return the mean over heads and tokens of KL(teacher || student) between softmax(x y^T / sqrt(head size))."""

    def log_probabilities(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = x.float() @ y.float().transpose(-1, -2) * x.shape[-1] ** -0.5
        return functional.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, EXCLUDED), dim=-1)

    with torch.no_grad():
        target = log_probabilities(*teacher)
    divergence = functional.kl_div(log_probabilities(*student), target, reduction="none", log_target=True)
    return _token_mean(divergence.sum(dim=-1).mean(dim=1), mask)
