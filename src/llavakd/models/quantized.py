"""Frozen matrices in few bits: a teacher's in 8, symmetric, one scale for each row and token; a student's in 4, below updates."""

import torch
from torch import Tensor, nn

from llavakd.errors import UserError, optional
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


class NF4Linear(nn.Module):
    """Stands for a frozen linear layer [..., K] -> [..., N]: uint8 `weight`, 4-bit NF4, scales in 8 bits (arXiv 2305.14314)."""

    def __init__(self, linear: nn.Linear, device: torch.device) -> None:
        super().__init__()
        bitsandbytes = optional("bitsandbytes", "lora_base: nf4", "qlora")
        # 0.50's kernel stores outputs in pairs: of an odd number of them, every other row's would lie askew.
        even = nn.functional.pad(linear.weight.detach().to(device), (0, 0, 0, linear.out_features % 2))
        weight, self.state = bitsandbytes.functional.quantize_nf4(even, compress_statistics=True)
        self.multiply, self.dequantize = bitsandbytes.matmul_4bit, bitsandbytes.functional.dequantize_nf4
        self.weight, self.linear = nn.Parameter(weight, False), linear
        linear.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """In autocast's dtype, where it is on; the float weight lives for the product only, and once more for its gradient."""
        kind, bias = x.device.type, self.linear.bias
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        y = self.multiply(x, self.weight, self.state)[..., : self.linear.out_features]
        return y if bias is None else y + bias.to(y.dtype)

    def widened(self) -> nn.Linear:
        """The float32 layer that this one computed: its weight as it was rounded, on the CPU."""
        weight = self.dequantize(self.weight, self.state)[: self.linear.out_features]
        self.linear.weight = nn.Parameter(weight.cpu().contiguous(), False)
        return self.linear


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
