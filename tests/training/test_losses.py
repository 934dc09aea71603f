import doctest
import math

import pytest
import torch
from conftest import assert_same

from supershaper_hf.training import losses
from supershaper_hf.training.losses import (
    alpha_divergence,
    attention_loss,
    hidden_state_loss,
    pooled_loss,
    relation_loss,
    soft_cross_entropy,
    state_loss,
)


def random_logits(scale=2.0, requires_grad=False):
    return (scale * torch.randn(5, 7)).requires_grad_(requires_grad)


def softmax(scores):
    return [math.exp(score) / sum(map(math.exp, scores)) for score in scores]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def logits_of(*probabilities):
    return torch.tensor([probabilities]).log()


def gradient_of(loss, student):
    student = student.detach().requires_grad_()
    loss(student).backward()
    return student.grad


def test_examples_run():
    results = doctest.testmod(losses)
    assert results.failed == 0
    assert results.attempted > 0


class TestSoftCrossEntropy:
    def test_entropy_of_a_fair_coin(self):
        logits = torch.zeros(1, 2)
        assert soft_cross_entropy(logits, logits).item() == pytest.approx(math.log(2))

    def test_case_by_hand(self):
        """Teacher (3/4, 1/4), student (1/2, 1/2), then student and teacher swapped."""
        sure, unsure = torch.tensor([[math.log(3), 0.0]]), torch.zeros(1, 2)
        assert soft_cross_entropy(unsure, sure).item() == pytest.approx(math.log(2))
        expected = -0.5 * math.log(3 / 4) - 0.5 * math.log(1 / 4)
        assert soft_cross_entropy(sure, unsure).item() == pytest.approx(expected)

    def test_loss_is_the_mean_over_positions(self):
        student, teacher = random_logits(), random_logits()
        each = [soft_cross_entropy(student[i : i + 1], teacher[i : i + 1]) for i in range(5)]
        assert_same(soft_cross_entropy(student, teacher), torch.stack(each).mean(), atol=1e-6)

    def test_temperature_divides_logits_and_multiplies_the_loss_by_its_square(self):
        student, teacher = random_logits(), random_logits()
        assert_same(soft_cross_entropy(student, teacher, 2.0), 4 * soft_cross_entropy(student / 2, teacher / 2))

    def test_loss_is_lowest_where_the_student_equals_the_teacher(self):
        teacher = random_logits()
        lowest = soft_cross_entropy(teacher, teacher)
        assert all(soft_cross_entropy(teacher + random_logits(0.1), teacher) > lowest for _ in range(10))

    def test_gradient_is_the_difference_of_the_distributions(self):
        student, teacher = random_logits(requires_grad=True), random_logits()
        soft_cross_entropy(student, teacher).backward()
        assert_same(student.grad, (student.softmax(-1) - teacher.softmax(-1)).detach() / len(student), atol=1e-7)

    def test_high_temperature_keeps_the_size_of_the_gradient(self):
        """At high temperature the gradient tends to the difference of the centred logits over the vocabulary size."""
        student, teacher = random_logits(requires_grad=True), random_logits()
        soft_cross_entropy(student, teacher, temperature=1000.0).backward()
        difference = (student - teacher).detach()
        centred = difference - difference.mean(dim=-1, keepdim=True)
        assert_same(student.grad, centred / 7 / len(student), atol=1e-3)


class TestAlphaDivergence:
    @pytest.mark.parametrize(
        ("student", "teacher", "expected"),
        [
            # alpha -1: (1/4 / 3/4 + 1/4 / 1/4 - 1) / 2 = 1/6, above KL(p || q) = .131
            ((1 / 2, 1 / 2), (3 / 4, 1 / 4), 1 / 6),
            # alpha -1: (9/16 / 1/2 + 1/16 / 1/2 - 1) / 2 = 1/8, below KL(p || q) = .144
            ((3 / 4, 1 / 4), (1 / 2, 1 / 2), 0.5 * math.log(2 / 3) + 0.5 * math.log(2)),
        ],
    )
    def test_the_larger_of_the_two_counts(self, student, teacher, expected):
        assert alpha_divergence(logits_of(*student), logits_of(*teacher)).item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.5, 2.0])
    def test_formula(self, alpha):
        p, q = [0.5, 0.2, 0.3], [0.3, 0.4, 0.3]
        expected = sum(b * ((a / b) ** alpha - 1) for a, b in zip(p, q)) / (alpha * (alpha - 1))
        divergence = alpha_divergence(logits_of(*q), logits_of(*p), alpha, alpha)
        assert divergence.item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(("alpha", "expected"), [(0.0, "reverse"), (1.0, "forward")])
    def test_limits(self, alpha, expected):
        p, q = [0.5, 0.2, 0.3], [0.3, 0.4, 0.3]
        student, teacher = logits_of(*q), logits_of(*p)
        limit = alpha_divergence(student, teacher, alpha, alpha)
        assert limit.item() == pytest.approx(kl(p, q) if expected == "forward" else kl(q, p), abs=1e-6)
        near = alpha_divergence(student, teacher, alpha + 0.002, alpha + 0.002)
        assert near.item() == pytest.approx(limit.item(), abs=1e-3)

    @pytest.mark.parametrize("alpha", [-1.0, -0.3, 0.0, 0.5, 1.0, 2.0])
    def test_gradient_is_exact_where_nothing_is_clipped(self, alpha):
        """Against autograd through the plain formula in double precision."""
        student, teacher = random_logits(0.5), random_logits(0.5)

        def plain(logits):
            p, q = teacher.double().softmax(-1), logits.double().softmax(-1)
            if alpha == 0:
                return (q * (q / p).log()).sum(-1).mean()
            if alpha == 1:
                return (p * (p / q).log()).sum(-1).mean()
            return (q * ((p / q) ** alpha - 1)).sum(-1).mean() / (alpha * (alpha - 1))

        def ours(logits):
            return alpha_divergence(logits, teacher, alpha, alpha, clip=1e6)

        assert ours(student).item() == pytest.approx(plain(student).item(), abs=1e-6)
        assert_same(gradient_of(ours, student), gradient_of(plain, student), atol=1e-6)

    def test_importance_is_clipped(self):
        """Teacher (1/100, 99/100), student (1/2, 1/2), alpha -1: importances 50 and 50/99, the first clipped to 5."""
        student, teacher = torch.zeros(1, 2), logits_of(0.01, 0.99)
        importances = [5, 50 / 99]
        loss = alpha_divergence(student, teacher, -1.0, -1.0)
        assert loss.item() == pytest.approx((0.5 * sum(importances) - 1) / 2, abs=1e-6)
        # The estimator -1/alpha sum_i q_i importance_i d log q_i, where d log q_i / d z_j = [i = j] - q_j.
        weights = [-0.5 * importance / -1 for importance in importances]
        expected = [weight - 0.5 * sum(weights) for weight in weights]
        gradient = gradient_of(lambda logits: alpha_divergence(logits, teacher, -1.0, -1.0), student)
        assert gradient[0].tolist() == pytest.approx(expected, abs=1e-6)
        unclipped = alpha_divergence(student, teacher, -1.0, -1.0, clip=100.0)
        assert unclipped.item() == pytest.approx((0.5 * (50 + 50 / 99) - 1) / 2, abs=1e-5)

    def test_the_limits_are_not_clipped(self):
        student, teacher = logits_of(0.01, 0.99), logits_of(0.99, 0.01)
        forward = alpha_divergence(student, teacher, 1.0, 1.0)
        assert forward.item() == pytest.approx(kl([0.99, 0.01], [0.01, 0.99]), abs=1e-5)
        gradient = gradient_of(lambda logits: alpha_divergence(logits, teacher, 1.0, 1.0), student)
        assert gradient[0].tolist() == pytest.approx([0.01 - 0.99, 0.99 - 0.01], abs=1e-6)
        reverse = alpha_divergence(student, teacher, 0.0, 0.0)
        assert reverse.item() == pytest.approx(kl([0.01, 0.99], [0.99, 0.01]), abs=1e-5)

    def test_each_position_chooses_for_itself(self):
        student = torch.cat([logits_of(1 / 2, 1 / 2), logits_of(3 / 4, 1 / 4)])
        teacher = torch.cat([logits_of(3 / 4, 1 / 4), logits_of(1 / 2, 1 / 2)])
        both = gradient_of(lambda logits: alpha_divergence(logits, teacher), student)
        low = gradient_of(lambda logits: alpha_divergence(logits, teacher[:1], -1.0, -1.0), student[:1])
        high = gradient_of(lambda logits: alpha_divergence(logits, teacher[1:], 1.0, 1.0), student[1:])
        assert_same(both, torch.cat([low, high]) / 2, atol=1e-7)
        value = (1 / 6 + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
        assert alpha_divergence(student, teacher).item() == pytest.approx(value, abs=1e-6)

    def test_equal_distributions(self):
        logits = random_logits()
        assert alpha_divergence(logits, logits).item() == pytest.approx(0, abs=1e-6)
        gradient = gradient_of(lambda student: alpha_divergence(student, logits), logits)
        assert_same(gradient, torch.zeros_like(logits), atol=1e-6)

    @pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e30])
    @pytest.mark.parametrize("alphas", [(-1.0, 1.0), (0.0, 2.0), (-3.0, 0.5)])
    def test_large_vocabulary_and_extreme_logits(self, scale, alphas):
        student, teacher = scale * torch.randn(2, 30_000), scale * torch.randn(2, 30_000)
        loss = alpha_divergence(student, teacher, *alphas)
        gradient = gradient_of(lambda logits: alpha_divergence(logits, teacher, *alphas), student)
        assert loss.isfinite()
        assert loss >= 0
        assert gradient.isfinite().all()
        if alphas == (-1.0, 1.0):  # other divergences are flat where the student is sure
            assert gradient.abs().max() > 0


class TestHiddenStateLoss:
    def test_case_by_hand(self):
        """Two layers of other widths; the last token is padding."""
        student = [torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[[0.0, 1.0], [2.0, 2.0], [9.0, 9.0]]])]
        teacher = [torch.tensor([[[4.0, 7.0], [2.0, 7.0], [0.0, 0.0]]]), torch.zeros(1, 3, 2)]
        first, second = (3**2 + 0) / 2, ((0 + 1) / 2 + (4 + 4) / 2) / 2
        loss = hidden_state_loss(student, teacher, torch.tensor([[1, 1, 0]]))
        assert loss.item() == pytest.approx((first + second) / 2)

    def test_mean_is_over_tokens_not_sequences(self):
        mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
        student = torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0, 5.0]).view(2, 3, 1)
        assert hidden_state_loss([student], [torch.zeros(2, 3, 1)], mask).item() == pytest.approx((3 + 4) / 4)

    def test_layers_must_match(self):
        with pytest.raises(ValueError, match="zip"):
            hidden_state_loss([torch.zeros(1, 1, 1)], [], torch.ones(1, 1))


def random_pair(size, heads=2, length=3):
    """Query and key, (1, heads, length, size)."""
    return torch.randn(1, heads, length, size), torch.randn(1, heads, length, size)


def attention_by_hand(query, key, head, token, keys):
    """Return the probabilities with which a token attends to `keys`, in plain Python."""
    q, size = query[0, head, token].tolist(), query.shape[-1]
    scores = [sum(a * b for a, b in zip(q, key[0, head, other].tolist())) / math.sqrt(size) for other in keys]
    return softmax(scores)


def divergence_by_hand(student, teacher, heads, tokens):
    """Mean over heads and tokens of KL(teacher || student), keys being the same tokens."""
    cases = [(head, token) for head in range(heads) for token in tokens]
    return sum(
        kl(attention_by_hand(*teacher, *case, tokens), attention_by_hand(*student, *case, tokens)) for case in cases
    ) / len(cases)


class TestAttentionLoss:
    def test_case_by_hand(self):
        """Two layers, two heads of other sizes in student and teacher, the last of three tokens padded."""
        student, teacher = [random_pair(2), random_pair(3)], [random_pair(4), random_pair(3)]
        expected = [divergence_by_hand(s, t, heads=2, tokens=[0, 1]) for s, t in zip(student, teacher)]
        loss = attention_loss(student, teacher, torch.tensor([[1, 1, 0]]))
        assert loss.item() == pytest.approx(sum(expected) / 2, abs=1e-6)

    def test_mean_is_over_tokens_not_sequences(self):
        student, teacher = random_pair(2), random_pair(2)
        both = [tuple(torch.cat([x, y]) for x, y in zip(s, random_pair(2))) for s in (student, teacher)]
        loss = attention_loss([both[0]], [both[1]], torch.tensor([[1, 1, 1], [1, 0, 0]]))
        # The lone token of the second sequence attends to itself alone in both: divergence 0.
        expected = divergence_by_hand(student, teacher, heads=2, tokens=[0, 1, 2]) * 3 / 4
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    def test_gradient_against_the_plain_formula(self):
        (query, key), (teacher_query, teacher_key) = random_pair(2), random_pair(4)
        teacher = (teacher_query @ teacher_key.mT / 2).softmax(-1)

        def plain(student_query):
            student = (student_query @ key.mT / math.sqrt(2)).softmax(-1)
            return (teacher * (teacher / student).log()).sum(-1).mean()

        def ours(student_query):
            return attention_loss([(student_query, key)], [(teacher_query, teacher_key)], torch.ones(1, 3))

        assert_same(gradient_of(ours, query), gradient_of(plain, query), atol=1e-6)

    def test_extreme_scores_and_sequences_of_padding_stay_finite(self):
        student = tuple((1e4 * torch.randn(2, 2, 3, 4)).requires_grad_() for _ in range(2))
        teacher = tuple(1e4 * torch.randn(2, 2, 3, 4) for _ in range(2))
        loss = attention_loss([student], [teacher], torch.tensor([[1, 1, 0], [0, 0, 0]]))
        loss.backward()
        assert loss.isfinite()
        assert all(tensor.grad.isfinite().all() for tensor in student)
        assert all(tensor.grad[1].abs().max() == 0 for tensor in student)  # the sequence of padding

    def test_padded_keys_are_excluded_however_low_the_other_scores(self):
        query, key = torch.full((1, 1, 3, 1), 100.0), torch.tensor([-100.0, -101.0, 0.0]).view(1, 1, 3, 1)
        teacher, mask = random_pair(2, heads=1), torch.tensor([[1, 1, 0]])
        expected = attention_loss([(query[:, :, :2], key[:, :, :2])], [[x[:, :, :2] for x in teacher]], mask[:, :2])
        assert_same(attention_loss([(query, key)], [teacher], mask), expected, atol=1e-6)

    def test_no_token_at_all(self):
        assert attention_loss([random_pair(2)], [random_pair(2)], torch.zeros(1, 3)).item() == 0


class TestRelationLoss:
    def test_case_by_hand(self):
        """Sum over query, key and value, each with itself; widths 4 and 6 in two heads; the last token is padding."""
        student, teacher = torch.randn(3, 1, 3, 4), torch.randn(3, 1, 3, 6)
        expected = 0.0
        for s, t in zip(student, teacher):
            s_heads = torch.stack([s[..., :2], s[..., 2:]], dim=1)
            t_heads = torch.stack([t[..., :3], t[..., 3:]], dim=1)
            expected += divergence_by_hand((s_heads, s_heads), (t_heads, t_heads), heads=2, tokens=[0, 1])
        loss = relation_loss(list(student), list(teacher), 2, torch.tensor([[1, 1, 0]]))
        assert loss.item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize("heads", [3, 4, 0])
    def test_heads_must_divide_both_widths(self, heads):
        message = (
            f"relation_heads={heads} must divide the width of the student's layer, 8, and of the teacher's, 6. "
            "Use a divisor of 2."
        )
        with pytest.raises(ValueError, match=message):
            relation_loss([torch.zeros(1, 2, 8)] * 3, [torch.zeros(1, 2, 6)] * 3, heads, torch.ones(1, 2))


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
LOSSES = {  # each takes the tensors of student and teacher, (2, 4, 8) or (positions, vocabulary)
    "cross_entropy": lambda s, t, mask: soft_cross_entropy(s.flatten(0, 1), t.flatten(0, 1)),
    "alpha": lambda s, t, mask: alpha_divergence(s.flatten(0, 1), t.flatten(0, 1)),
    "hidden": lambda s, t, mask: hidden_state_loss([s, s], [t, t], mask),
    "attention": lambda s, t, mask: attention_loss([(s.view(2, 1, 4, 8),) * 2], [(t.view(2, 1, 4, 8),) * 2], mask),
    "relation": lambda s, t, mask: relation_loss([s] * 3, [t] * 3, 2, mask),
}


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    def test_only_the_student_gets_gradients(self, name):
        student, teacher = torch.randn(2, 4, 8, requires_grad=True), torch.randn(2, 4, 8, requires_grad=True)
        LOSSES[name](student, teacher, MASK).backward()
        assert teacher.grad is None
        assert student.grad.abs().max() > 0

    def test_computed_in_full_precision(self, name):
        student, teacher = torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8).bfloat16()
        expected = LOSSES[name](student.float(), teacher.float(), MASK)
        loss = LOSSES[name](student, teacher, MASK)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = LOSSES[name](student.float(), teacher.float(), MASK)
        assert loss.dtype == under_autocast.dtype == torch.float32
        assert_same([loss, under_autocast], [expected, expected], atol=0)


@pytest.mark.parametrize("name", ["hidden", "attention", "relation"])
class TestEveryLossOfLayers:
    def test_padding_has_no_effect(self, name):
        student, teacher = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
        changed = [torch.where(MASK.bool().unsqueeze(-1), x, 100 * torch.randn_like(x)) for x in (student, teacher)]
        assert_same(LOSSES[name](*changed, MASK), LOSSES[name](student, teacher, MASK), atol=1e-6)
        gradient = gradient_of(lambda s: LOSSES[name](s, changed[1], MASK), changed[0])
        assert gradient[MASK == 0].abs().max() == 0


def two_sequences():
    """States of a student and a teacher; the second sequence ends in two tokens of padding, whose states are huge."""
    student, teacher = torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    student[1, 2:], teacher[1, 2:] = 1e6, -1e6
    return student, teacher, mask


class TestStateLoss:
    def test_mean_over_tokens_of_the_relative_error(self):
        student, teacher, mask = two_sequences()
        each = [((s - t) @ (s - t)) / (t @ t) for s, t in zip(student[mask == 1], teacher[mask == 1])]
        assert_same(state_loss(student, teacher, mask), torch.stack(each).mean())

    def test_size_of_the_states_does_not_matter(self):
        student, teacher, mask = two_sequences()
        assert_same(state_loss(7 * student, 7 * teacher, mask), state_loss(student, teacher, mask))

    @pytest.mark.parametrize(("factor", "expected"), [(1.0, 0.0), (0.0, 1.0), (2.0, 1.0), (-1.0, 4.0)])
    def test_scale(self, factor, expected):
        _, teacher, mask = two_sequences()
        assert state_loss(factor * teacher, teacher, mask).item() == pytest.approx(expected, abs=1e-6)

    def test_half_precision_is_computed_in_full(self):
        student, teacher, mask = (tensor.bfloat16() for tensor in two_sequences())
        loss = state_loss(student, teacher, mask)
        assert loss.dtype == torch.float32
        assert_same(loss, state_loss(student.float(), teacher.float(), mask), atol=0)


class TestPooledLoss:
    def test_mean_over_sequences_of_the_cosine_of_means(self):
        student, teacher, mask = two_sequences()
        cosines = []
        for s, t, real in zip(student, teacher, mask == 1):
            s, t = s[real].mean(0), t[real].mean(0)
            cosines.append((s @ t) / (s.norm() * t.norm()))
        assert_same(pooled_loss(student, teacher, mask), 1 - torch.stack(cosines).mean())

    def test_first_tokens(self):
        student, teacher, mask = two_sequences()
        expected = pooled_loss(student[:, :1], teacher[:, :1], mask[:, :1])
        assert_same(pooled_loss(student, teacher, mask, "cls"), expected)

    def test_only_the_direction_counts(self):
        _, teacher, mask = two_sequences()
        assert pooled_loss(3 * teacher, teacher, mask).item() == pytest.approx(0, abs=1e-6)
        assert pooled_loss(-teacher, teacher, mask, "cls").item() == pytest.approx(2, abs=1e-6)


@pytest.mark.parametrize("loss", [state_loss, pooled_loss])
def test_gradients_of_states_flow_into_real_tokens_of_the_student_only(loss):
    student, teacher, mask = two_sequences()
    student.requires_grad_()
    teacher.requires_grad_()
    loss(student, teacher, mask).backward()
    assert teacher.grad is None
    assert student.grad[mask == 1].abs().min() > 0
    assert not student.grad[mask == 0].any()
