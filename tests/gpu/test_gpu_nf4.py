"""A base in 4 bits on a GPU, in bf16: gradients of the updates beside float64's, memory, and a whole run of a stage."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import LlavaForConditionalGeneration

from llavakd.config import load_recipe
from llavakd.models.quantized import NF4Linear
from llavakd.pipeline import run_pipeline

pytest.importorskip("bitsandbytes", reason="needs the extra qlora")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SMOKE = Path(__file__).parents[2] / "recipes" / "shapes" / "smoke.yaml"


def linear(out: int, into: int) -> nn.Linear:
    torch.manual_seed(out + into)
    layer = nn.Linear(into, out).requires_grad_(False)
    nn.init.normal_(layer.weight, std=into**-0.5)
    return layer


@pytest.mark.parametrize(("out", "into"), [(1024, 2048), (341, 128), (128, 341)])
@pytest.mark.parametrize("tokens", [1, 16, 200, 700])
def test_a_layer_is_that_of_its_rounded_weight_and_small(tokens, out, into):
    before = torch.cuda.memory_allocated()
    held = NF4Linear(linear(out, into), torch.device("cuda"))
    assert torch.cuda.memory_allocated() - before < 0.55 * out * into + 4096
    held.to("cuda")
    x = torch.randn(2, tokens, into, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = held(x)
    assert y.dtype == torch.bfloat16
    outward = torch.randn(2, tokens, out, device="cuda").bfloat16()
    y.backward(outward)
    plain = NF4Linear(linear(out, into), torch.device("cuda")).widened()
    weight = plain.weight.double().cuda()
    for found, wanted in (
        (y, x.double() @ weight.T + plain.bias.double().cuda()),
        (x.grad, outward.double() @ weight),
    ):
        assert float((found.double() - wanted).detach().norm() / wanted.detach().norm()) < 0.01


def test_a_stage_in_bf16_learns_and_leaves_a_plain_float32_model(tmp_path):
    first, last = {}, {}
    for base in ("float32", "nf4"):
        AcceleratorState._reset_state(reset_partial_state=True)
        changes = ["precision=bf16", "trackers=[]", "evaluation=null", "gradient_checkpointing=true"]
        changes += ["stages.sft.lora_rank=16", f"stages.sft.lora_base={base}", "stages.sft.learning_rate=3e-3"]
        changes += ["stages.dft.max_tokens_per_batch=1024", "stages.dft.micro_batch_size=null"]
        changes += ["stages.dft.lora_rank=16", f"stages.dft.lora_base={base}"]
        run_pipeline(load_recipe(SMOKE, changes), tmp_path / base)
        lines = (tmp_path / base / "sft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        first[base], last[base] = (json.loads(lines[place])["loss"] for place in (0, -1))
    assert last["nf4"] < first["nf4"]
    assert first["nf4"] == pytest.approx(first["float32"], rel=0.2)
    assert last["nf4"] == pytest.approx(last["float32"], rel=0.3)
    model, report = LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "nf4" / "dft" / "model", output_loading_info=True
    )
    assert not any(report.values())
    assert model.dtype == torch.float32
