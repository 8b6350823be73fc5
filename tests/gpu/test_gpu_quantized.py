"""Layers in 8 bits on a GPU: its own products against float64, and how far they move a small random teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakd.errors import UserError
from llavakd.models.fast import compile_layers
from llavakd.models.quantized import KINDS, QuantizedLinear, quantize
from llavakd.models.student import VisionLanguageModel, vision_features

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
# Relative error of a product of normal numbers, of whose two sides each is rounded to 4 significant bits, or to 255 steps.
ERRORS = {"fp8": 0.045, "int8": 0.02}


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "fp8" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs a Hopper GPU")
    return request.param


def linear(out: int, into: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(out + into)
    layer = nn.Linear(into, out, bias=bias, device="cuda")
    nn.init.normal_(layer.weight, std=into**-0.5)
    return layer.bfloat16()


@pytest.mark.parametrize("tokens", [1, 16, 17, 700])
@pytest.mark.parametrize(("out", "into"), [(2048, 2048), (256, 2048), (2048, 11008), (48, 96)])
def test_a_layer_is_as_near_to_float64_as_its_8_bits_allow(kind, out, into, tokens):
    layer = linear(out, into)
    x = torch.randn(tokens, into, device="cuda").bfloat16()
    got = QuantizedLinear(layer, KINDS[kind])(x)
    want = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert got.dtype == torch.bfloat16
    assert float((got.double() - want).norm() / want.norm()) < ERRORS[kind]


def test_the_device_multiplies_what_was_stored(kind):
    """Rows and weights that lie on the grid come out but for the rounding to bfloat16 (and fp8's fast sums)."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows, weight = (torch.randint(-8, 9, (60, 64), device="cuda", generator=generator).float() for _ in range(2))
    largest = {"fp8": 448.0, "int8": 127.0}[kind]
    rows[:, 0], weight[:, 0] = largest, largest  # the scales are one
    layer = nn.Linear(64, 64, bias=False, device="cuda")
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:60] = weight
        got = QuantizedLinear(layer, KINDS[kind])(rows)[:, :60]
    want = rows.double() @ weight.double().T
    assert float((got - want).abs().max() / want.abs().max()) < (2.0**-7 if kind == "fp8" else 1e-6)


def teacher(gates: int = 512, tower_gates: int = 128) -> VisionLanguageModel:
    text = {"model_type": "qwen2", "hidden_size": 256, "intermediate_size": gates, "num_hidden_layers": 4}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 64, "num_hidden_layers": 2}
    vision |= {"intermediate_size": tower_gates}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    config = LlavaConfig(text_config=text, vision_config=vision, image_seq_length=16)
    model = LlavaForConditionalGeneration._from_config(config).bfloat16().cuda().eval().requires_grad_(False)
    return VisionLanguageModel(model=model, tokenizer=None, image_processor=None)


def logits_of(model: VisionLanguageModel) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(10, 2000, (3, 120), device="cuda", generator=generator)
    with torch.no_grad():
        hidden = model.model.model.language_model(input_ids=ids).last_hidden_state
        return 8 * (hidden.double() @ model.head.double().T)  # as sharp as a trained model's


def test_a_small_teacher_drifts_little_compiled_or_not_and_shrinks(kind):
    exact = teacher()
    changed = copy.deepcopy(exact)
    before = torch.cuda.memory_allocated()
    quantize(changed, kind)
    freed = before - torch.cuda.memory_allocated()
    layers = exact.parts()["language_model"].layers
    weights = sum(module.weight.numel() for module in layers.modules() if isinstance(module, nn.Linear))
    assert 0.9 * weights < freed <= weights
    p, q = (logits_of(model).log_softmax(-1) for model in (exact, changed))
    drift = float((p.exp() * (p - q)).sum(-1).mean())
    entropy = float(-(p.exp() * p).sum(-1).mean())
    assert 1e-6 < drift < 0.05
    assert entropy < 7.5  # of at most log 2048 = 7.62: it says something
    for layer in changed.parts()["language_model"].layers:
        layer.compile(dynamic=False)
    again = logits_of(changed).log_softmax(-1)
    assert float((p.exp() * (p - again)).sum(-1).mean()) == pytest.approx(drift, rel=0.2)


def test_compiled_layers_read_a_row_of_gates_once_and_pad_no_columns(kind):
    model = teacher(gates=11_008, tower_gates=1_104)
    quantize(model, kind)
    compile_layers(model.model)

    def run():
        pixels = torch.randn(2, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
        return vision_features(model.model, pixels), logits_of(model)

    with inductor.patch(force_disable_caches=True), torch.no_grad():
        _, codes = run_and_get_code(run)
    code = "\n".join(codes)
    assert "triton_per_fused" in code
    assert "triton_red_fused" not in code
    assert "(1104, 1)" in code
    assert "(1152, 1)" not in code


def test_sizes_that_the_device_does_not_multiply_are_refused(kind):
    model = teacher()
    layers = model.parts()["language_model"].layers
    layers[0].mlp.up_proj = linear(510, 256, bias=False)
    with pytest.raises(UserError, match=r"0\.mlp\.up_proj is Linear.*multiples of 16; use quantize: none"):
        quantize(model, kind)
