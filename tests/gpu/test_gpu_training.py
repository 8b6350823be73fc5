"""On a GPU: the same pipeline in bf16, and its losses beside fp32's."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from llavakd.config import load_recipe
from llavakd.pipeline import run_pipeline

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SMOKE = Path(__file__).parents[2] / "recipes" / "shapes" / "smoke.yaml"


def first_lines(out: Path) -> dict[str, dict]:
    return {
        stage: json.loads((out / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for stage in ("dpt", "sft", "dft")
    }


def test_bf16_and_fp32_start_with_the_same_losses(tmp_path):
    found = {}
    for precision in ("fp32", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)  # one precision a process, otherwise
        changes = [f"precision={precision}", "trackers=[]", "evaluation=null"]
        run_pipeline(load_recipe(SMOKE, changes), tmp_path / precision)
        found[precision] = first_lines(tmp_path / precision)
    for part in ("ce", "response_kl", "visual_kl", "relation"):
        assert found["bf16"]["dpt"][part] == pytest.approx(found["fp32"]["dpt"][part], rel=0.05)
    assert found["bf16"]["dft"]["memory_gib"] > 0
