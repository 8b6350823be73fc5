"""On two GPUs: the pipeline in bf16, replicated and in shards, beside one GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llavakd.models.student import load_student

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.dist,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SMOKE = Path(__file__).parents[2] / "recipes" / "shapes" / "smoke.yaml"
STAGES = ("dpt", "sft", "dft")
PARTS = ("loss", "ce", "response_kl", "visual_kl", "relation", "grad_norm")


def run(out: Path, processes: int, sharding: str) -> dict[str, list[dict]]:
    """Lines of metrics.jsonl by stage."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    changes = [f"sharding={sharding}", "precision=bf16", "trackers=[]", "evaluation=null", "log_every=1"]
    # A small rate: AdamW moves a weight by the rate also where its gradient is but rounding.
    changes += [f"stages.{stage}.{change}" for stage in STAGES for change in ("learning_rate=1e-5", "epochs=0.25")]
    command = [sys.executable, *by, "-m", "llavakd", "train", str(SMOKE), *changes, "--out", str(out)]
    one = {"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {}
    done = subprocess.run(command, env=os.environ | one, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return {
        stage: [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        for stage in STAGES
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return run(folder, 1, "none"), folder


@pytest.mark.parametrize("sharding", ["none", "student", "both", "zero2", "zero3"])
def test_two_gpus_lose_what_one_loses(alone, tmp_path, sharding):
    if sharding.startswith("zero"):
        pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    lines, folder = alone
    found = run(tmp_path, 2, sharding)
    for stage in STAGES:
        assert [line["step"] for line in found[stage]] == [line["step"] for line in lines[stage]]
        for line, other in zip(found[stage], lines[stage], strict=True):
            for part in PARTS:
                if part in other:
                    assert line[part] == pytest.approx(other[part], rel=0.02, abs=1e-4), (stage, line["step"], part)
    ours, theirs = (load_student(str(each / "dft" / "model")).model.state_dict() for each in (tmp_path, folder))
    for name, weight in theirs.items():
        assert float((ours[name] - weight).norm()) <= 0.02 * float(weight.norm()) + 1e-3, name
