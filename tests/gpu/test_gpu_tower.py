"""On a GPU: a tower in bfloat16 whose GELU comes with its product is as near to float64 as the stock one."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakd.models.fast import compile_layers, trim_tower
from llavakd.models.student import vision_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def model_of(activation: str) -> LlavaForConditionalGeneration:
    text = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 100}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 144, "intermediate_size": 336, "image_size": 126}
    vision |= {"num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 14, "hidden_act": activation}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_select_strategy="full")
    model = LlavaForConditionalGeneration._from_config(config).cuda().eval().requires_grad_(False)
    for name, weight in model.model.vision_tower.named_parameters():
        if weight.dim() == 2 or "bias" in name:
            weight.normal_(std=0.15)  # as wide as a trained one's: GELU is seen on both of its sides
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", "gelu"])
def test_features_are_as_near_to_float64_as_those_of_the_stock_tower(activation, compiled):
    exact = model_of(activation)
    stock, ours = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    for weight, rounded in zip(exact.parameters(), stock.parameters(), strict=True):
        weight.copy_(rounded)
    pixels = torch.randn(5, 3, 126, 126, device="cuda").bfloat16()
    wanted = vision_features(exact.double(), pixels.double())
    trim_tower(ours)
    fused = [module for module in ours.modules() if type(module).__name__ == "_GeluLinear"]
    assert len(fused) == (4 if activation == "gelu_pytorch_tanh" else 0)
    if compiled:
        compile_layers(ours)
    with torch.no_grad():
        found = [vision_features(model, pixels).double() for model in (ours, stock)]
    error, usual = ((features - wanted).norm() / wanted.norm() for features in found)
    assert 0 < usual < 0.02
    assert error < 1.05 * usual
    assert ours.state_dict().keys() == stock.state_dict().keys()


def test_a_float32_tower_keeps_its_activation():
    model = model_of("gelu_pytorch_tanh")
    trim_tower(model)
    assert not any(isinstance(module, nn.Identity) for module in model.model.vision_tower.modules())
