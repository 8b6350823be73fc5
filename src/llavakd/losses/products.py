"""Matrix products of the losses, and in which precision they are taken."""

import torch
from torch import Tensor

_LOW = (torch.bfloat16, torch.float16)


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """In what the products are taken: float32 on a CPU, on a GPU the autocast type or the hidden states' own."""
    if hidden.dtype == torch.float64 or not hidden.is_cuda:
        return exact_dtype(hidden)
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden.dtype


def gradient_dtype(hidden: Tensor) -> torch.dtype:
    """In what the gradient to the logits is rounded: a weight of 1 / tokens takes it below float16's range."""
    return torch.bfloat16 if operand_dtype(hidden) == torch.float16 else operand_dtype(hidden)


def exact_dtype(hidden: Tensor) -> torch.dtype:
    """In what softmax, divergence and sums are taken."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def product(left: Tensor, right: Tensor) -> Tensor:
    """[n, k] @ [k, m] with a float32 result (float64 for float64): half-precision logits would drown a small KL."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype in _LOW and left.is_cuda:
            return torch.mm(left, right, out_dtype=torch.float32)
        return left @ right


def precise_product(left: Tensor, right: Tensor) -> Tensor:
    """[..., n, k] @ [..., k, m] to float32 rounding; on a GPU as sums of bfloat16 products (arXiv 1904.06376)."""
    if not left.is_cuda or torch.float64 in (left.dtype, right.dtype):
        exact = torch.promote_types(torch.float32, torch.promote_types(left.dtype, right.dtype))
        return left.to(exact) @ right.to(exact)
    lefts, rights = parts_of(left), parts_of(right)
    # A float32 number is a sum of three bfloat16 ones; products of parts below the last bit are left out.
    pairs = [(one, other) for i, one in enumerate(lefts) for other in rights[: 3 - i]]
    multiply, add = (torch.mm, torch.addmm) if left.dim() == 2 else (torch.bmm, torch.baddbmm)
    result = multiply(*pairs[-1], out_dtype=torch.float32)
    for pair in pairs[-2::-1]:
        add(result, *pair, out_dtype=torch.float32, out=result)
    return result


def parts_of(values: Tensor) -> list[Tensor]:
    """bfloat16 tensors that sum up to `values`, largest first."""
    if values.dtype == torch.bfloat16:
        return [values]
    first = values.bfloat16()
    second = values - first
    return [first, second.bfloat16(), (second - second.bfloat16()).bfloat16()]


def accumulate(target: Tensor, left: Tensor, right: Tensor, *, onto: bool) -> None:
    """Add left @ right to target (write it there unless `onto`), in its precision and inside the product."""
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype in _LOW and left.is_cuda:
            torch.addmm(target, left, right, out_dtype=torch.float32, beta=int(onto), out=target)
        else:
            torch.addmm(target, left, right, beta=int(onto), out=target)
