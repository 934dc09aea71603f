"""Losses between a student and a teacher: predictions, hidden states, attention, attention relations.

Each is a mean over positions, labelled ones or real tokens, computed in float32; gradients flow into the student only.
`distillation.py` says who teaches whom.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


# Score of a padded key: its probability is exactly 0. With -inf the divergence would contain 0 * (inf - inf).
EXCLUDED = -1e30


def soft_cross_entropy(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the mean cross-entropy, in nats, of the student's distribution under the teacher's.

    Args:
        student_logits: (positions, vocab_size).
        teacher_logits: (positions, vocab_size).
        temperature: Divides both logits; the loss is multiplied by its square, so that gradients keep their size
            (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> round(soft_cross_entropy(logits, logits).item(), 4)  # the entropy of softmax(2, 0)
        0.3653
    """
    teacher = functional.softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return functional.cross_entropy(student_logits.float() / temperature, teacher) * temperature**2


def alpha_divergence(
    student_logits: Tensor, teacher_logits: Tensor, alpha_min: float = -1.0, alpha_max: float = 1.0, clip: float = 5.0
) -> Tensor:
    """Return the mean over positions of the larger of two alpha-divergences between teacher p and student q.

    D_alpha(p || q) = sum_i q_i ((p_i / q_i)^alpha - 1) / (alpha (alpha - 1)), which tends to KL(q || p) at alpha 0 and
    to KL(p || q) at alpha 1. A negative alpha punishes a student that is sure where the teacher is not, a positive one
    the reverse. Source: AlphaNet (Wang et al., 2021, arXiv 2102.07954), section 3.

    The value is the divergence with importances (p_i / q_i)^alpha of at most `clip`. Its gradient is the paper's
    estimator, -1 / alpha sum_i q_i min((p_i / q_i)^alpha, clip) d log q_i: exact where nothing is clipped. As in the
    authors' code, the two limits are not clipped.

    Args:
        student_logits: (positions, vocab_size).
        teacher_logits: (positions, vocab_size).
        alpha_min: One alpha.
        alpha_max: The other alpha.
        clip: Bound of an importance; at least 1.

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
    """Return D_alpha (positions,), and weights (positions, vocab_size) whose -sum_i weight_i d log q_i is its gradient.

    With f(r) = (r^alpha - 1) / (alpha (alpha - 1)) and r = p / q, the derivative of q f(p / q) by q is f(r) - r f'(r) =
    -r^alpha / alpha + constant, and a constant times sum_i q_i d log q_i is 0. Takes log-probabilities: a ratio of
    probabilities would be 0 / 0 where both underflow.
    """
    ratio = teacher - student
    if abs(alpha) < 1e-3:
        return -(student.exp() * ratio).sum(dim=-1), student.exp() * ratio
    if abs(alpha - 1) < 1e-3:
        return (teacher.exp() * ratio).sum(dim=-1), teacher.exp()
    weights = (student + (alpha * ratio).clamp(max=math.log(clip))).exp()
    return (weights.sum(dim=-1) - 1) / (alpha * (alpha - 1)), weights / alpha


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Return the mean squared error between the layers' outputs: TinyBERT (arXiv 1909.10351, section 3.1) in place.

    A narrowed layer works on the first channels of the full one, so they are compared without a learned projection.

    Args:
        student: For each layer the student kept, (batch, length, w).
        teacher: For the same layers, (batch, length, W) with W >= w.
        attention_mask: (batch, length), 0 for padding.

    Returns:
        The mean over channels, real tokens, and layers.

    Example:
        >>> hidden_state_loss([torch.zeros(1, 1, 2)], [torch.tensor([[[1.0, 3.0, 9.0]]])], torch.ones(1, 1)).item()
        5.0
    """
    losses = [
        _token_mean((s.float() - t.detach()[..., : s.shape[-1]].float()).square().mean(dim=-1), attention_mask)
        for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()


def attention_loss(
    student: Sequence[tuple[Tensor, Tensor]], teacher: Sequence[tuple[Tensor, Tensor]], attention_mask: Tensor
) -> Tensor:
    """Return KL(teacher || student) of the attention distributions softmax(q k^T / sqrt(head size)), in nats.

    TinyBERT compares attention scores; the distributions are comparable at any head size.

    Args:
        student: For each layer the student kept, query and key: (batch, heads, length, head_size).
        teacher: For the same layers, query and key with as many heads, of any size.
        attention_mask: (batch, length), 0 for padding: no key, and no query that counts.

    Returns:
        The mean over heads, real query tokens, and layers.

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
    """Return MiniLMv2's loss (arXiv 2012.15828, section 3.1): KL(teacher || student) of self-attention relations.

    Queries are split into `relation_heads` heads and compared with each other, softmax(q q^T / sqrt(head size));
    likewise keys and values.

    Args:
        student_qkv: Query, key, value of one layer, (batch, length, width) each.
        teacher_qkv: The same of the teacher, whose width may differ.
        relation_heads: Must divide both widths.
        attention_mask: (batch, length), 0 for padding.

    Returns:
        The sum over query, key and value, as in the paper, of means over heads and real tokens.

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
    """Return the mean of `values` (batch, length) over real tokens, 0 where there are none."""
    real = attention_mask != 0
    return values.masked_fill(~real, 0).sum() / real.sum().clamp(min=1)


def _relation_divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    """Return the mean over heads and real tokens of KL(teacher || student) of softmax(x y^T / sqrt(head size))."""

    def log_probabilities(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = x.float() @ y.float().transpose(-1, -2) * x.shape[-1] ** -0.5
        return functional.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, EXCLUDED), dim=-1)

    with torch.no_grad():
        target = log_probabilities(*teacher)
    divergence = functional.kl_div(log_probabilities(*student), target, reduction="none", log_target=True)
    return _token_mean(divergence.sum(dim=-1).mean(dim=1), mask)
