"""The losses at the widths of real heads on a GPU: precision against float64 on the very same bfloat16 inputs."""

from __future__ import annotations

import pytest
import torch

from llavakd.losses import distill_rows, relation_distance

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
VOCABULARY = 20_000


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator, device="cuda")).bfloat16()


def relation64(hidden: list, heads: list) -> torch.Tensor:
    """1 - cos of the two Gram matrices of materialised float64 logits, per picture."""
    grams = []
    for one, head in zip(hidden, heads, strict=True):
        logits = one @ head.T
        grams.append((logits @ logits.mT).flatten(1))
    return 1 - torch.cosine_similarity(*grams, dim=1)


@pytest.mark.parametrize("tokens", [64, 729])
def test_the_relation_of_bfloat16_hidden_states_and_its_gradients(tokens):
    hidden, head = draw(2, tokens, 256), draw(VOCABULARY, 256, scale=0.2)
    taught, teacher_head = draw(2, tokens, 384), draw(VOCABULARY, 384, scale=0.2)
    leaves = [tensor.clone().requires_grad_(True) for tensor in (hidden, head)]
    got = relation_distance(leaves[0], leaves[1], taught, teacher_head)
    exact = [tensor.double().requires_grad_(True) for tensor in (hidden, head)]
    want = relation64([exact[0], taught.double()], [exact[1], teacher_head.double()])
    assert torch.allclose(got.double(), want, rtol=1e-5)
    wanted = torch.autograd.grad(want.sum(), exact)
    for grad, other in zip(torch.autograd.grad(got.sum(), leaves), wanted, strict=True):
        assert grad.dtype == torch.bfloat16
        assert float((grad.double() - other).norm() / other.norm()) < 0.003  # rounding to bfloat16 alone gives 0.0017


def test_a_relation_near_agreement_is_still_resolved():
    hidden, head = draw(1, 100, 256), draw(VOCABULARY, 256, scale=0.2)
    close = (hidden.float() * (1 + 0.004 * draw(1, 100, 256).float())).bfloat16()
    got = relation_distance(close, head, hidden, head)
    want = relation64([close.double(), hidden.double()], [head.double()] * 2)
    assert 0 < float(want) < 1e-4
    assert torch.allclose(got.double(), want, rtol=1e-3)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "total_variation"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_in_several_chunks_equal_float64(kind, temperature):
    rows = 700
    hidden, head = draw(rows, 128), draw(VOCABULARY, 128, scale=0.3)
    taught, teacher_head = draw(rows, 192), draw(VOCABULARY, 192, scale=0.25)
    labels = torch.randint(VOCABULARY, (rows,), device="cuda")
    labels[::3] = -100
    weight = torch.full((rows,), 1 / rows, device="cuda")
    results = []
    for chunk, backend, cast in ((150, "triton", torch.Tensor.bfloat16), (1000, "torch", torch.Tensor.double)):
        given = [cast(tensor) for tensor in (hidden, head, taught, teacher_head)]
        leaves = [tensor.clone().requires_grad_(True) for tensor in given[:2]]
        loss = distill_rows(
            *leaves,
            *given[2:],
            labels,
            ce_weight=weight,
            kl_weight=weight,
            divergence=kind,
            temperature=temperature,
            chunk_rows=chunk,
            backend=backend,
        )
        results.append([loss.ce, loss.kl, *torch.autograd.grad(loss.ce + loss.kl, leaves)])
    for index, (got, want) in enumerate(zip(*results, strict=True)):
        error = float((got.double() - want).norm() / want.norm())
        assert error < (1e-5 if index < 2 else 0.005), f"part {index}: {error:.2e}"
