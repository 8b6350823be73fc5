"""relation_distance against materialised logits in float64."""

from __future__ import annotations

import pytest
import torch
from losses_oracle import assert_near, double, relation64

from llavakd.losses import relation as relation_module
from llavakd.losses.relation import gram, relation_distance

SHARED = 123
OPTIONS = [{}, {"center": True}, {"row_normalize": True}, {"center": True, "row_normalize": True}]


def inputs(seed: int = 0, batch: int = 3, tokens: int = 47, dtype: torch.dtype = torch.float32) -> tuple:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    student = (draw(batch, tokens, 31) + 0.5).to(dtype).requires_grad_(True)
    head = draw(131, 31).to(dtype).requires_grad_(True)
    return student, head, (draw(batch, tokens, 19) + 0.5).to(dtype), draw(127, 19).to(dtype)


def oracle(given: tuple, weight: torch.Tensor, **options) -> tuple:
    hidden, head = double(given[0]), double(given[1])
    teacher = given[3].double()
    distance = torch.stack(
        [relation64((hidden[i], head), (given[2][i].double(), teacher), SHARED, **options) for i in range(len(hidden))]
    )
    return distance, torch.autograd.grad(distance @ weight.double(), [hidden, head])


@pytest.mark.parametrize("options", OPTIONS)
def test_it_equals_the_gram_of_materialised_logits_in_value_and_gradient(options):
    given, weight = inputs(), torch.tensor([1.0, -2.0, 0.7])
    got = relation_distance(*given, vocab_size=SHARED, **options)
    want, grads = oracle(given, weight, **options)
    assert got.dtype == torch.float32
    assert_near(got, want)
    for grad, wanted in zip(torch.autograd.grad(got @ weight, given[:2]), grads, strict=True):
        assert_near(grad, wanted)


def test_the_options_change_the_distance():
    """Otherwise the comparison above could not tell whether they are read."""
    given = inputs()
    distances = [relation_distance(*given, vocab_size=SHARED, **options) for options in OPTIONS]
    for index, one in enumerate(distances):
        for other in distances[:index]:
            assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inputs_are_computed_in_float32(autocast):
    given, weight = inputs(dtype=torch.bfloat16), torch.ones(3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        got = relation_distance(*given, vocab_size=SHARED)
    want, grads = oracle(given, weight)
    assert_near(got, want)
    for grad, wanted in zip(torch.autograd.grad(got.sum(), given[:2]), grads, strict=True):
        assert_near(grad, wanted, 2 * torch.finfo(torch.bfloat16).eps)


def test_the_gram_matrix_is_that_of_the_logits():
    hidden, head, *_ = inputs()
    logits = hidden.detach().double() @ head.detach().double().T
    assert_near(gram(hidden, head), logits @ logits.mT)


@pytest.mark.parametrize("side", [0, 1, 2, 3])
def test_scaling_the_logits_of_one_side_changes_nothing(side):
    given = [tensor.detach() for tensor in inputs()]
    before = relation_distance(*given, vocab_size=SHARED)
    given[side] = 7.0 * given[side]
    assert_near(relation_distance(*given, vocab_size=SHARED), before)


def test_each_picture_has_its_own_distance_and_not_one_of_the_whole_batch():
    given = inputs()
    with torch.no_grad():
        given[0][1] *= 100  # would outweigh the other pictures in one cosine over the batch
    together = relation_distance(*given, vocab_size=SHARED)
    for index in range(3):
        alone = relation_distance(
            given[0][index : index + 1], given[1], given[2][index : index + 1], given[3], vocab_size=SHARED
        )
        assert_near(together[index : index + 1], alone)
    (grad,) = torch.autograd.grad(together[0], given[0])
    assert grad[0].any()
    assert not grad[1:].any()


def test_head_rows_beyond_vocab_size_take_no_part():
    given = [tensor.detach() for tensor in inputs()]
    before = relation_distance(*given, vocab_size=SHARED)
    given[1][SHARED:] = 1e3
    given[3][SHARED:] = -1e3
    assert torch.equal(relation_distance(*given, vocab_size=SHARED), before)
    assert not torch.allclose(relation_distance(*given, vocab_size=127), before, rtol=1e-2)


def test_a_student_equal_to_its_teacher_has_distance_and_gradient_zero():
    hidden, head, *_ = inputs()
    distance = relation_distance(hidden, head, hidden.detach(), head.detach())
    assert float(distance.detach().abs().max()) < 1e-10
    for grad in torch.autograd.grad(distance.sum(), [hidden, head]):
        assert float(grad.abs().max()) < 1e-6


def test_near_agreement_is_resolved_below_float32_cancellation():
    """1 - cos taken as a difference would be lost below 6e-8."""
    hidden, head = (tensor.detach() for tensor in inputs()[:2])
    close = hidden + 1e-5 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    got = relation_distance(hidden, head, close, head)
    exact = [tensor.double() for tensor in (hidden, close, head)]
    want = torch.stack([relation64((exact[0][i], exact[2]), (exact[1][i], exact[2]), len(head)) for i in range(3)])
    assert float(want.max()) < 1e-8
    assert_near(got, want, 2e-2)


def test_no_gradient_reaches_the_teacher():
    given = inputs()
    for tensor in given[2:]:
        tensor.requires_grad_(True)
    relation_distance(*given, vocab_size=SHARED).sum().backward()
    assert given[0].grad.any()
    assert given[1].grad.any()
    assert given[2].grad is None
    assert given[3].grad is None


@pytest.mark.parametrize("options", OPTIONS)
def test_a_picture_with_fewer_tokens_is_that_of_its_valid_ones(options):
    given = inputs()
    valid = torch.ones(3, 47, dtype=torch.bool)
    valid[1, 20:] = False
    valid[2, ::3] = False
    with torch.no_grad():
        given[0][~valid], given[2][~valid] = float("inf"), 1e3  # padding may hold anything
    got = relation_distance(*given, vocab_size=SHARED, valid=valid, **options)
    (grad,) = torch.autograd.grad(got.sum(), given[0])
    for index in range(3):
        kept = [given[side][index : index + 1, valid[index]].detach() for side in (0, 2)]
        kept[0].requires_grad_(True)
        alone = relation_distance(kept[0], given[1], kept[1], given[3], vocab_size=SHARED, **options)
        assert_near(got[index : index + 1], alone)
        assert_near(grad[index][valid[index]], torch.autograd.grad(alone.sum(), kept[0])[0][0], 1e-4)
    assert not grad[~valid].any()


def test_the_square_of_a_frozen_head_is_made_once_and_again_after_a_change(monkeypatch):
    made, product = [], relation_module.product
    monkeypatch.setattr(relation_module, "product", lambda *a: made.append(1) or product(*a))
    given = [tensor.detach() for tensor in inputs()]
    before = relation_distance(*given, vocab_size=SHARED)
    assert len(made) == 2
    assert torch.equal(relation_distance(*given, vocab_size=SHARED), before)
    assert len(made) == 2
    given[3][3] += 1
    assert not torch.equal(relation_distance(*given, vocab_size=SHARED), before)
    assert len(made) == 3
    relation_distance(*given, vocab_size=SHARED - 1)
    assert len(made) == 5, "another vocabulary is another square"
    given[1].requires_grad_(True)
    for _ in range(2):
        relation_distance(*given, vocab_size=SHARED - 1)
    assert len(made) == 7, "a head that learns is squared every time"


def test_second_derivatives_are_refused():
    given = inputs()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(relation_distance(*given, vocab_size=SHARED).sum(), given[1], create_graph=True)
