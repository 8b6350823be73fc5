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


def test_packs_with_a_float32_teacher_lose_what_padded_rows_lose(tmp_path):
    found = {}
    for name, changes in {"padded": [], "packed": ["stages.dft.max_tokens_per_batch=1024"]}.items():
        AcceleratorState._reset_state(reset_partial_state=True)
        changes = ["precision=bf16", "trackers=[]", "evaluation=null", "stages.dft.micro_batch_size=null", *changes]
        run_pipeline(load_recipe(SMOKE, changes), tmp_path / name)
        found[name] = first_lines(tmp_path / name)["dft"]
    for part in ("ce", "response_kl", "visual_kl", "relation"):
        assert found["packed"][part] == pytest.approx(found["padded"][part], rel=0.05), part


def test_training_from_a_cache_of_all_ids_loses_what_training_with_the_teacher_loses(tmp_path):
    found = {}
    changes = ["precision=bf16", "trackers=[]", "evaluation=null", "cache_features=false", "teacher.dtype=bfloat16"]
    changes += [f"stages.{stage}.losses.relation=0" for stage in ("dpt", "dft")]
    for name in ("there", "stored"):
        kept = [f"teacher.cache={tmp_path / 'cache'}"] * (name == "stored")
        recipe = load_recipe(SMOKE, changes + kept)
        if kept:
            AcceleratorState._reset_state(reset_partial_state=True)
            run_pipeline(recipe, tmp_path / name, cache={"top_k": 612, "visual_share": 1.0})
        AcceleratorState._reset_state(reset_partial_state=True)
        run_pipeline(recipe, tmp_path / name)
        found[name] = first_lines(tmp_path / name)
    for stage in ("dpt", "dft"):
        for part in ("ce", "response_kl", "visual_kl"):
            assert found["stored"][stage][part] == pytest.approx(found["there"][stage][part], rel=0.05), (stage, part)
