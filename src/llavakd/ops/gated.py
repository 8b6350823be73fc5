"""silu(x G^T) * (x U^T) in one kernel of a Hopper GPU: neither product comes to memory. For layers that never learn."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

_TILE, _DEPTH, _GROUP = 128, 64, 32  # benchmarks/results/gated.json


@triton.jit
def _gated_kernel(x, gate, up, out, rows, columns, WIDTH: constexpr, TILE: constexpr, DEPTH: constexpr, GROUP: constexpr):
    down, across = tl.cdiv(rows, TILE), tl.cdiv(columns, TILE)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0)):
        first = tile // (GROUP * across) * GROUP  # of GROUP rows of tiles, which stay in the cache while columns go by
        high = tl.minimum(down - first, GROUP)
        row = (first + tile % (GROUP * across) % high) * TILE
        column = tile % (GROUP * across) // high * TILE
        a = tl.zeros((TILE, TILE), tl.float32)
        b = tl.zeros((TILE, TILE), tl.float32)
        for k in range(0, WIDTH, DEPTH):
            some = x.load([row, k])
            a = tl.dot(some, gate.load([column, k]).T, a)
            b = tl.dot(some, up.load([column, k]).T, b)
        out.store([row, column], (a * tl.sigmoid(a) * b).to(out.dtype))


@torch.library.custom_op("llavakd::gated", mutates_args=())
def gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """[..., N] of x [..., K], gate and up [N, K], all in one half-precision dtype, K and N multiples of 8; float32 between."""
    assert x.dtype == gate.dtype == up.dtype and gate.shape == up.shape, "the kernel takes one dtype and two equal matrices"
    flat = x.flatten(0, -2)
    out = torch.empty((len(flat), len(gate)), dtype=x.dtype, device=x.device)
    pieces = [(one, [_TILE, _DEPTH]) for one in (flat, gate, up)] + [(out, [_TILE, _TILE])]
    described: list[Any] = [TensorDescriptor.from_tensor(one, piece) for one, piece in pieces]
    many = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 2
    sizes = {"WIDTH": x.shape[-1], "TILE": _TILE, "DEPTH": _DEPTH, "GROUP": _GROUP}
    with torch.cuda.device_of(x):
        _gated_kernel[(many,)](*described, len(flat), len(gate), **sizes, num_warps=8, num_stages=3)
    return out.unflatten(0, x.shape[:-1])


@gated.register_fake
def _(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(gate)))
