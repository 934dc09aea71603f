import math

import pytest
import torch
from conftest import assert_same

from supershaper_hf.distillation import mixed_loss, soft_cross_entropy


def random_logits(scale=2.0, requires_grad=False):
    return (scale * torch.randn(5, 7)).requires_grad_(requires_grad)


def test_entropy_of_a_fair_coin():
    logits = torch.zeros(1, 2)
    assert soft_cross_entropy(logits, logits).item() == pytest.approx(math.log(2))


def test_case_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2), then student and teacher swapped."""
    sure, unsure = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
    assert soft_cross_entropy(unsure, sure).item() == pytest.approx(math.log(2))
    expected = -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4)
    assert soft_cross_entropy(sure, unsure).item() == pytest.approx(expected)


def test_loss_is_the_mean_over_positions():
    student, teacher = random_logits(), random_logits()
    each = [soft_cross_entropy(student[i : i + 1], teacher[i : i + 1]) for i in range(5)]
    assert_same(soft_cross_entropy(student, teacher), torch.stack(each).mean(), atol=1e-6)


def test_temperature_divides_logits_and_multiplies_the_loss_by_its_square():
    student, teacher = random_logits(), random_logits()
    assert_same(soft_cross_entropy(student, teacher, 2.0), 4 * soft_cross_entropy(student / 2, teacher / 2))


def test_loss_is_lowest_where_the_student_equals_the_teacher():
    teacher = random_logits()
    lowest = soft_cross_entropy(teacher, teacher)
    assert all(soft_cross_entropy(teacher + random_logits(0.1), teacher) > lowest for _ in range(10))


def test_gradient_is_the_difference_of_the_distributions():
    student, teacher = random_logits(requires_grad=True), random_logits()
    soft_cross_entropy(student, teacher).backward()
    assert_same(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / len(student), atol=1e-7)


def test_teacher_gets_no_gradient():
    student, teacher = random_logits(requires_grad=True), random_logits(requires_grad=True)
    mixed_loss(torch.tensor(1.0), student, teacher, distillation_weight=0.5).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_high_temperature_keeps_the_size_of_the_gradient():
    """At high temperature the gradient tends to the difference of the centred logits over the vocabulary size."""
    student, teacher = random_logits(requires_grad=True), random_logits()
    soft_cross_entropy(student, teacher, temperature=1000.0).backward()
    difference = (student - teacher).detach()
    centred = difference - difference.mean(dim=-1, keepdim=True)
    assert_same(student.grad, centred / 7 / len(student), atol=1e-3)


def test_half_precision_logits_are_compared_in_full_precision():
    student, teacher = random_logits().bfloat16(), random_logits().bfloat16()
    loss = soft_cross_entropy(student, teacher)
    assert loss.dtype == torch.float32
    assert_same(loss, soft_cross_entropy(student.float(), teacher.float()), atol=0)


def test_weight_0_is_the_loss_on_the_labels_alone():
    unusable = torch.full((5, 7), float("nan"))
    assert mixed_loss(torch.tensor(1.25), random_logits(), unusable, distillation_weight=0).item() == 1.25


def test_weight_1_is_the_loss_on_the_teacher_alone():
    student, teacher = random_logits(), random_logits()
    mixed = mixed_loss(torch.tensor(1.25), student, teacher, distillation_weight=1)
    assert_same(mixed, soft_cross_entropy(student, teacher), atol=0)


def test_weight_mixes_linearly():
    student, teacher = random_logits(), random_logits()
    mixed = mixed_loss(torch.tensor(1.25), student, teacher, distillation_weight=0.3, temperature=2.0)
    assert_same(mixed, 0.7 * 1.25 + 0.3 * soft_cross_entropy(student, teacher, temperature=2.0), atol=1e-6)
