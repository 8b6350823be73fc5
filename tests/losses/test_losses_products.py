"""The products' arithmetic: what bfloat16 parts of a float32 number keep, and the precise product (on a GPU, if any)."""

from __future__ import annotations

import pytest
import torch

from llavakd.losses.products import parts_of, precise_product

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)
    return (values * torch.logspace(-3, 3, shape[-1], dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize(("dtype", "count"), [(torch.bfloat16, 1), (torch.float16, 3), (torch.float32, 3)])
def test_parts_add_up_to_the_number_to_float32_rounding(dtype, count):
    values = draw(50, 40, dtype=dtype)
    parts = parts_of(values)
    assert [part.dtype for part in parts] == [torch.bfloat16] * count
    error = (sum(part.double() for part in parts) - values.double()).abs()
    assert bool((error <= 2**-24 * values.double().abs()).all())


@pytest.mark.parametrize("shapes", [((48, 40), (40, 16)), ((3, 48, 40), (3, 40, 16))])
@pytest.mark.parametrize("left", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("right", [torch.bfloat16, torch.float32])
def test_the_precise_product_is_that_of_float64(shapes, left, right):
    one, other = draw(*shapes[0], dtype=left).to(DEVICE), draw(*shapes[1], dtype=right).to(DEVICE)
    got, want = precise_product(one, other), one.double() @ other.double()
    size = one.double().abs() @ other.double().abs()
    assert got.dtype == torch.float32
    assert bool(((got.double() - want).abs() <= 4e-6 * size).all())
