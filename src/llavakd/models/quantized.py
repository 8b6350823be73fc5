"""A frozen teacher's matrices in 8 bits: symmetric, one scale for each row of a weight and, as it runs, for each token."""

import torch
from torch import Tensor, nn

from llavakd.errors import UserError
from llavakd.models.student import VisionLanguageModel

KINDS = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


class QuantizedLinear(nn.Module):
    """Stands for a linear layer [..., K] -> [..., N]: 8-bit `weight` [N, K], float32 `scale` [1, N], the layer's bias."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach(), dtype)
        self.weight, self.scale, self.bias = nn.Parameter(weight, False), nn.Buffer(scale.t()), linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """8-bit tokens times the 8-bit weight, scaled back in float32 (fp8: as it leaves the product, in bfloat16)."""
        rows, scale = quantize_rows(x.flatten(0, -2), self.weight.dtype)
        weight = self.weight.t()
        if weight.dtype == torch.int8:
            rows = nn.functional.pad(rows, (0, 0, 0, max(0, 17 - len(rows))))  # a GPU multiplies no fewer
            y = torch._int_mm(rows, weight)[: len(scale)] * scale * self.scale
        else:
            y = torch._scaled_mm(rows, weight, scale, self.scale, out_dtype=torch.bfloat16, use_fast_accum=True)
        return (y if self.bias is None else y + self.bias).to(x.dtype).unflatten(0, x.shape[:-1])


def quantize_rows(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows [M, K] in a dtype of KINDS, and their float32 scales [M, 1]; the two multiplied are near `values`."""
    scale = values.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / LARGEST[dtype]
    scaled = values / scale
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def quantize(model: VisionLanguageModel, kind: str) -> None:
    """Put a QuantizedLinear for each linear layer of the decoder layers; UserError where the device or a size forbids it."""
    device, layers = model.model.device, model.parts()["language_model"].get_submodule("layers")
    on_gpu = device.type == "cuda"
    if kind == "fp8" and device.type != "meta" and not (on_gpu and torch.cuda.get_device_capability(device) >= (9, 0)):
        found = torch.cuda.get_device_name(device) if on_gpu else f"a {device.type}"
        raise UserError(f"teacher.quantize: fp8 needs a Hopper GPU or a newer one, found {found}; use quantize: int8")
    for name, linear in [(name, layer) for name, layer in layers.named_modules() if isinstance(layer, nn.Linear)]:
        if on_gpu and any(size % 16 for size in linear.weight.shape):
            raise UserError(f"teacher.quantize: {name} is {linear}; a GPU needs multiples of 16; use quantize: none")
        layers.set_submodule(name, QuantizedLinear(linear, KINDS[kind]))
