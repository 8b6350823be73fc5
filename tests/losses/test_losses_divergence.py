"""The divergences term by term: formulas, gradients on the logits, limits, and the order of their arguments."""

from __future__ import annotations

import math

import pytest
import torch
from losses_oracle import assert_near, divergence64, softmax64

from llavakd.losses.divergence import DIVERGENCES, resolve


def two_logits(rows: int = 47, width: int = 123, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(spread * torch.randn(rows, width, generator=generator) for _ in range(2))


def value(kind: str, student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """From log-probabilities."""
    return DIVERGENCES[resolve(kind, beta)](student, teacher, beta).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_each_divergence_equals_its_formula_in_value_and_gradient(kind, beta):
    if kind == "skewed_kl" and beta == 1:
        return  # M = P: always zero, and refused
    ours, theirs = two_logits()
    got = value(kind, ours.requires_grad_(True).log_softmax(-1), theirs.log_softmax(-1), beta)
    truth = ours.detach().double().requires_grad_(True)
    want = torch.stack(
        [divergence64(kind, softmax64(theirs[i].double()), softmax64(truth[i]), beta) for i in range(len(got))]
    )
    assert_near(got, want)
    assert_near(*(torch.autograd.grad(total.sum(), logits)[0] for total, logits in ((got, ours), (want, truth))))


def test_two_coins_worked_by_hand():
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    skewed = 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)  # 0.2 of the teacher: 0.3 and 0.7
    assert float(value("forward_kl", student, teacher)) == pytest.approx(forward, rel=1e-6)
    assert float(value("reverse_kl", student, teacher)) == pytest.approx(reverse, rel=1e-6)
    assert float(value("skewed_kl", student, teacher, 0.2)) == pytest.approx(skewed, rel=1e-6)
    assert float(value("total_variation", student, teacher)) == pytest.approx(0.25, rel=1e-6)
    assert forward != pytest.approx(reverse, rel=1e-2)


def test_jsd_of_one_half_is_symmetric_and_bounded_by_the_logarithm_of_two():
    q, p = (logits.log_softmax(-1) for logits in two_logits())
    assert torch.allclose(value("jsd", q, p), value("jsd", p, q), atol=1e-6)
    assert float(value("jsd", q, p).max()) <= math.log(2) + 1e-6
    assert not torch.allclose(value("jsd", q, p, 0.2), value("jsd", p, q, 0.2), atol=1e-2)


def test_mixtures_near_their_ends_come_from_the_kl_of_that_end():
    q, p = (logits.double().log_softmax(-1) for logits in two_logits(width=5, spread=0.5))
    small = 1e-6
    assert torch.allclose(value("jsd", q, p, small) / small, value("forward_kl", q, p), rtol=1e-3)
    assert torch.allclose(value("jsd", q, p, 1 - small) / small, value("reverse_kl", q, p), rtol=1e-3)
    assert torch.allclose(value("skewed_kl", q, p, small), value("forward_kl", q, p), rtol=1e-3)
    assert not torch.allclose(value("forward_kl", q, p), value("reverse_kl", q, p), rtol=1e-2)


@pytest.mark.parametrize(("kind", "beta"), [("jsd", 1.1), ("jsd", -0.1), ("skewed_kl", 1.0), ("jsd", math.nan)])
def test_a_beta_outside_its_range_is_refused(kind, beta):
    with pytest.raises(ValueError, match=f"{beta}.*{kind}"):
        resolve(kind, beta)
