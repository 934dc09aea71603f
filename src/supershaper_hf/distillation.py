"""What a subnet learns from: the labels, and the full supernet's predictions for the same batch.

In-place distillation (Yu and Huang, "Universally Slimmable Networks", 2019, section 3.2): the largest network of a
training step is the teacher of the others.
"""

import torch
from torch.nn import functional


def soft_cross_entropy(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Return the mean cross-entropy, in nats, of the student's distribution under the teacher's.

    Args:
        student_logits: (positions, vocab_size).
        teacher_logits: (positions, vocab_size); no gradient flows into them.
        temperature: Divides both logits; the loss is multiplied by its square, so that gradients keep their size
            (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015).

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> round(soft_cross_entropy(logits, logits).item(), 4)  # the entropy of softmax(2, 0)
        0.3654
    """
    teacher = functional.softmax(teacher_logits.detach().float() / temperature, dim=-1)
    return functional.cross_entropy(student_logits.float() / temperature, teacher) * temperature**2


def mixed_loss(
    hard_loss: torch.Tensor,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    distillation_weight: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """Return `(1 - distillation_weight)` of the loss on the labels plus `distillation_weight` of the teacher's."""
    if distillation_weight == 0:
        return hard_loss
    soft = soft_cross_entropy(student_logits, teacher_logits, temperature)
    return (1 - distillation_weight) * hard_loss + distillation_weight * soft
