"""Linear layers in 8 bits against float64 written from the formula, and where in a teacher they stand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llavakd.config import TeacherConfig
from llavakd.errors import UserError
from llavakd.models.quantized import KINDS, QuantizedLinear, quantize
from llavakd.models.student import load_teacher


def nearest_integers(values: torch.Tensor) -> torch.Tensor:
    return values.round()


def nearest_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Three bits behind the leading one, exponents from -6 (below it the steps stay equal), ties to even."""
    exponent = values.abs().clamp(min=2.0**-6).log2().floor()
    step = 2.0 ** (exponent - 3)
    return (values / step).round() * step


GRIDS = {"fp8": (nearest_e4m3, 448), "int8": (nearest_integers, 127)}


def on_the_grid(rows: torch.Tensor, kind: str) -> torch.Tensor:
    """Each row scaled so that its largest value is the grid's, moved to the grid and scaled back, in float64."""
    nearest, largest = GRIDS[kind]
    scale = rows.double().abs().amax(-1, keepdim=True) / largest
    return torch.where(scale > 0, nearest(rows.double() / scale) * scale, 0)


def layer_and_input(bias: bool, *shape: int) -> tuple[nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + bias)
    layer = nn.Linear(64, 48, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        layer.weight[:, 5] *= 20  # outliers, and rows of very different size
        layer.weight *= torch.logspace(-3, 2, 48)[:, None]
        layer.weight[7] = 0
    x = torch.randn(*shape, 64, generator=generator) * torch.logspace(-2, 3, shape[-1])[:, None]
    x[..., 0, :] = 0
    return layer, x


@pytest.mark.parametrize("shape", [(40,), (3, 17), (2, 2, 5), (3,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_product_of_both_sides_on_the_grid(kind, bias, shape):
    layer, x = layer_and_input(bias, *shape)
    with torch.no_grad():
        got = QuantizedLinear(layer, KINDS[kind])(x)
        left, right = on_the_grid(x, kind), on_the_grid(layer.weight, kind)
        product, bias = left @ right.T, torch.zeros(48) if layer.bias is None else layer.bias
        exact = nn.functional.linear(x.double(), layer.weight.double(), bias.double())
    assert got.dtype == torch.float32
    assert got.shape == (*shape, 48)
    # float32 sums and, of fp8, a product that leaves as bfloat16, which is off by 2^-8 of itself.
    bound = 2e-6 * (left.abs() @ right.abs().T + bias.abs()) + (2.0**-8 * product.abs() if kind == "fp8" else 0)
    assert bool(((got - product - bias).abs() <= bound).all())
    assert float((got - exact).norm() / exact.norm()) > (0.01 if kind == "fp8" else 0.001)  # it is not the layer itself


@pytest.mark.parametrize("kind", KINDS)
def test_a_16_bit_layer_keeps_its_dtype_and_a_quantised_one_half_of_its_bytes(kind):
    layer, x = layer_and_input(False, 20)
    made = QuantizedLinear(layer.bfloat16(), KINDS[kind])
    assert made(x.bfloat16()).dtype == torch.bfloat16
    assert [tensor.nbytes for tensor in made.parameters()] == [layer.weight.nbytes // 2]
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in made.buffers()] == [((1, 48), torch.float32)]
    assert not any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_compiles_into_one_graph(kind):
    layer, x = layer_and_input(True, 3, 17)
    made = QuantizedLinear(layer, KINDS[kind])
    assert torch.equal(torch.compile(made, backend="aot_eager", fullgraph=True)(x), made(x))


def test_the_decoder_layers_are_quantised_and_nothing_else_is(tiny):
    exact, teacher = (load_teacher(TeacherConfig(path=str(tiny.teacher))) for _ in range(2))
    quantize(teacher, "int8")
    linears = {name for name, module in exact.model.named_modules() if isinstance(module, nn.Linear)}
    replaced = {name for name in linears if not isinstance(teacher.model.get_submodule(name), nn.Linear)}
    assert replaced == {name for name in linears if ".language_model.layers." in name}
    assert len(replaced) == 2 * 7
    assert {type(teacher.model.get_submodule(name)) for name in replaced} == {QuantizedLinear}
    held = teacher.model.state_dict()
    for name, tensor in exact.model.state_dict().items():
        if name.removesuffix(".weight") in replaced:
            assert held[name].dtype == torch.int8
        else:
            assert torch.equal(held[name], tensor), name
    assert teacher.model.dtype == torch.bfloat16  # what a picture is cast to


def test_fp8_on_a_cpu_is_refused_with_the_remedy(tiny):
    teacher = load_teacher(TeacherConfig(path=str(tiny.teacher)))
    with pytest.raises(UserError, match=r"fp8 needs a Hopper GPU or a newer one, found a cpu; use quantize: int8"):
        quantize(teacher, "fp8")
    assert not any(isinstance(module, QuantizedLinear) for module in teacher.model.modules())
