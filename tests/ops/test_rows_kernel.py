"""The Triton scorer against the portable one (whose oracle is the formula): values, gradient, and its dtype."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from llavakd.losses import LogitForm, distill_rows
from llavakd.losses.rows import IGNORE_INDEX, score_torch
from llavakd.ops import rows as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3), ("skewed_kl", 0.1), ("total_variation", 0.5)]
ROWS, WIDTH = 7, 301
PLAIN = {"divergence": "forward_kl", "beta": 0.5, "temperature": 1.0, "forms": (LogitForm(), LogitForm())}


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch):
    """A row takes more than two blocks and the last is ragged."""
    monkeypatch.setattr(kernels, "_BLOCK", 128)
    monkeypatch.setattr(kernels, "_WARPS", 1)


def problem(spread: float = 3.0, shift: float = 0.0) -> tuple:
    generator = torch.Generator().manual_seed(5)
    logits, taught = (spread * torch.randn(ROWS, WIDTH, generator=generator) + shift for _ in range(2))
    labels = torch.tensor([0, WIDTH - 1, IGNORE_INDEX, 128, 127, 5, 300])
    ce_weight = torch.tensor([1.0, 0.3, 0.7, 0.0, 2.0, 0.5, 0.1])
    kl_weight = torch.tensor([0.5, 0.0, 1.0, 1.5, 0.2, 0.0, 0.7])
    return tuple(tensor.to(DEVICE) for tensor in (logits, taught, labels, ce_weight, kl_weight))


def both(given: tuple, dtype: torch.dtype = torch.float32, **options) -> tuple:
    how, results = tuple((PLAIN | options).values()), []
    for scorer in (kernels.score_triton, score_torch):
        grad = torch.full_like(given[0], torch.nan, dtype=dtype)
        results.append((*scorer(*given, how, grad), grad))
    return tuple(results)


def assert_same(got: tuple, want: tuple, tolerance: float = 1e-5) -> None:
    for name, one, other in zip(("ce", "divergence", "gradient")[-len(got) :], got, want, strict=True):
        assert one.dtype == other.dtype
        error = float((one.float() - other.float()).abs().max())
        assert error <= tolerance * max(1.0, float(other.float().abs().max())), f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_every_divergence_and_temperature(kind, beta, temperature):
    got, want = both(problem(), divergence=kind, beta=beta, temperature=temperature)
    assert_same(got, want)
    assert (want[1] != 0).tolist() == [True, False, True, True, True, False, True]


@pytest.mark.parametrize("forms", [((0.5, 4.0), (1.0, 0.0)), ((2.0, 0.0), (0.7, 3.0)), ((1.5, 2.0), (0.5, 5.0))])
def test_soft_caps_and_scales(forms):
    assert_same(*both(problem(), temperature=1.3, forms=tuple(LogitForm(*form) for form in forms)), tolerance=1e-5)


def test_cross_entropy_alone_needs_no_teacher():
    logits, _, labels, ce_weight, kl_weight = problem()
    got, want = both((logits, None, labels, ce_weight, torch.zeros_like(kl_weight)))
    assert_same(got, want)
    assert not want[1].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_gradient_is_rounded_once(dtype):
    assert_same(*both(problem(), dtype), tolerance=torch.finfo(dtype).eps)


def test_the_gradient_may_go_into_part_of_a_buffer_and_the_logits_stay():
    given = problem()
    before, buffer = given[0].clone(), torch.full((ROWS + 2, WIDTH + 3), 7.0, device=DEVICE)
    kernels.score_triton(*given, tuple(PLAIN.values()), buffer[1:-1, :WIDTH])
    assert torch.equal(given[0], before)
    assert_same((buffer[1:-1, :WIDTH],), both(given)[1][2:], tolerance=1e-5)
    buffer[1:-1, :WIDTH] = 7.0
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_large_logits_do_not_overflow(shift):
    got, want = both(problem(spread=40.0, shift=shift))
    assert all(tensor.isfinite().all() for tensor in got)
    assert_same(got, want, tolerance=1e-5)


def test_a_width_below_one_block_and_of_exactly_two():
    for width in (100, 256):
        logits, taught, _, ce_weight, kl_weight = problem()
        labels = torch.arange(ROWS, device=DEVICE)
        given = (logits[:, :width].contiguous(), taught[:, :width].contiguous(), labels, ce_weight, kl_weight)
        assert_same(*both(given))


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_the_whole_loss_is_the_same_on_both_backends(kind):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    hidden, head, taught, teacher_head = draw(29, 16), draw(WIDTH + 9, 16), draw(29, 24), draw(WIDTH + 4, 24)
    labels = torch.randint(WIDTH, (29,), generator=generator).to(DEVICE)
    labels[::3] = IGNORE_INDEX
    weights = {"ce_weight": draw(29).abs(), "kl_weight": draw(29).abs() * (torch.arange(29, device=DEVICE) % 4 > 0)}
    results = []
    for backend in ("torch", "triton"):
        leaves = [tensor.clone().requires_grad_(True) for tensor in (hidden, head)]
        loss = distill_rows(
            *leaves,
            taught,
            teacher_head,
            labels,
            **weights,
            divergence=kind,
            vocab_size=WIDTH,
            chunk_rows=8,
            backend=backend,
        )
        results.append([*loss, *torch.autograd.grad(loss.ce + loss.kl, leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.detach().abs().max()))


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from llavakd.ops.rows import _rows_kernel
types = {"grad": "*bf16", "labels": "*i64", "stride": "i32", "taught_stride": "i32", "grad_stride": "i32"}
types |= dict.fromkeys(("logits", "taught", "ce_weight", "kl_weight", "ce_out", "kl_out"), "*fp32")
names = {name: "constexpr" if name.isupper() else types.get(name, "fp32") for name in _rows_kernel.arg_names}
capped = names | {"form": ("fp32",) * 2, "taught_form": ("fp32",) * 2, "mix": ("fp32",) * 3}
plain = capped | dict.fromkeys(("form", "taught_form"), ("fp32", "constexpr"))
uncapped = {(_rows_kernel.arg_names.index(form), 1): None for form in ("form", "taught_form")}
fixed = {"VOCAB": 151936, "SOFT": True, "BLOCK": 2048}
for types, constants in (
    (capped, {"KIND": "forward_kl"}),
    (capped, {"KIND": "jsd"}),
    (plain, {"KIND": "jsd"} | uncapped),
    (plain | {"taught": "constexpr"}, {"KIND": None, "taught": None} | uncapped),
):
    source = ASTSource(_rows_kernel, types, fixed | constants)
    binary = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert binary.asm["cubin"] and ".local" not in binary.asm["ptx"], "registers spill"
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is for Linux")
def test_the_kernel_compiles_for_hopper_without_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", COMPILE], check=True, env=environment)
