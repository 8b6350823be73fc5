"""The plain divergences: formulas, limits, and the order of their arguments."""

from __future__ import annotations

import math

import pytest
import torch
from losses_oracle import assert_near, divergence64

from llavakd.losses.divergence import DIVERGENCES, forward_kl, jsd, reverse_kl


def two_distributions(rows: int = 47, width: int = 123, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.log_softmax(spread * torch.randn(rows, width, generator=generator), -1) for _ in range(2))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", list(DIVERGENCES))
def test_each_divergence_equals_its_formula_in_value_and_gradient(kind, beta):
    q, p = two_distributions()
    q.requires_grad_(True)
    got = DIVERGENCES[kind](q, p, beta)
    truth = q.detach().double().requires_grad_(True)
    want = torch.stack([divergence64(kind, p[i].double().exp(), truth[i].exp(), beta) for i in range(len(q))])
    assert_near(got, want)
    assert_near(torch.autograd.grad(got.sum(), q)[0], torch.autograd.grad(want.sum(), truth)[0])


def test_two_coins_worked_by_hand():
    teacher, student = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    reverse = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(forward_kl(student, teacher, 0.5)) == pytest.approx(forward, rel=1e-6)
    assert float(reverse_kl(student, teacher, 0.5)) == pytest.approx(reverse, rel=1e-6)
    assert forward != pytest.approx(reverse, rel=1e-2)


def test_jsd_of_one_half_is_symmetric_and_bounded_by_the_logarithm_of_two():
    q, p = two_distributions()
    assert torch.allclose(jsd(q, p, 0.5), jsd(p, q, 0.5), atol=1e-6)
    assert float(jsd(q, p, 0.5).max()) <= math.log(2) + 1e-6
    assert not torch.allclose(jsd(q, p, 0.2), jsd(p, q, 0.2), atol=1e-2)


def test_jsd_near_its_ends_is_its_mixture_times_the_kl_of_that_end():
    q, p = (logp.double() for logp in two_distributions(width=5, spread=0.5))
    small = 1e-6
    assert torch.allclose(jsd(q, p, small) / small, forward_kl(q, p, 0.5), rtol=1e-3)
    assert torch.allclose(jsd(q, p, 1 - small) / small, reverse_kl(q, p, 0.5), rtol=1e-3)
    assert not torch.allclose(forward_kl(q, p, 0.5), reverse_kl(q, p, 0.5), rtol=1e-2)
