"""Two processes that share every global batch train what one process trains."""

import json
import os
import subprocess
import sys

import pytest
import torch

from llavakd.models.student import load_student

pytestmark = pytest.mark.dist

PARTS = ("loss", "ce", "response_kl", "visual_kl", "relation", "grad_norm", "lr")


def mixed_tree(tiny):
    """Three short stages on rows with no, one and two pictures: the projector alone, then the rest, by both reductions.

    Micro-batches of one row, so that some hold no picture on one process while the other's does. The rate is small: AdamW
    moves a weight by about the rate whatever its gradient, also where that is but rounding.
    """
    tree = tiny.tree()
    for stage, reduction in zip(tree["stages"], ("sample", "token", "sample"), strict=True):
        stage |= {"data": "mixed", "grouping": "none", "epochs": 1, "learning_rate": 1.0e-4, "reduction": reduction}
        stage |= {"global_batch_size": 8, "warmup_ratio": 0.0}
    tree["save_every"] = 1
    return tree


def torchrun(recipe, out):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "llavakd", "train", str(recipe), "--out", str(out)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, err = process.communicate(timeout=120)
    finally:
        process.terminate()  # which ends the two as well
    return process.wait(), err


@pytest.mark.parametrize(
    ("sharding", "dealt"), [("none", "rows"), ("none", "packs"), ("student", "rows"), ("both", "packs")]
)
def test_two_processes_equal_one_in_every_part_of_the_loss_and_every_weight(tiny, command, tmp_path, sharding, dealt):
    """One process at once, two in micro-batches of one row, or in packs, of which they have unequally many.

    With shards there are also a tower that learns, low-rank updates, and layers computed twice.
    """
    tree = mixed_tree(tiny)
    tree["sharding"] = sharding  # one process has nothing to shard
    if sharding == "student":
        tree["stages"][2]["train"].append("vision_tower")
    if sharding == "both":
        tree["stages"][1]["lora_rank"] = 4
        tree["gradient_checkpointing"] = True
    tree["data"]["mixed"]["max_length"] = 200
    alone = command("train", tiny.recipe(tmp_path / "alone.yaml", tree), "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    for stage in tree["stages"]:
        stage |= {"micro_batch_size": 1} if dealt == "rows" else {"max_tokens_per_batch": 200}
    code, err = torchrun(tiny.recipe(tmp_path / "together.yaml", tree), tmp_path / "together")
    assert code == 0, err
    share = "1 rows x 4 accumulated" if dealt == "rows" else "4 rows in packs of up to 200 tokens"
    assert err.count(f"4 steps of 8 rows = 2 processes x {share}") == 3
    for stage in ("dpt", "sft", "dft"):
        lines, other_lines = (
            [json.loads(line) for line in (tmp_path / run / stage / "metrics.jsonl").read_text().splitlines()]
            for run in ("alone", "together")
        )
        assert [line["step"] for line in lines] == [line["step"] for line in other_lines] == [1, 2, 3, 4]
        for line, other in zip(lines, other_lines, strict=True):
            values, others = ({part: entry[part] for part in PARTS if part in entry} for entry in (line, other))
            assert values == pytest.approx(others, rel=2e-5, abs=1e-7), (stage, line["step"])
        weights, other_weights = (
            load_student(str(tmp_path / run / stage / "model")).model.state_dict() for run in ("alone", "together")
        )
        for name, tensor in weights.items():
            if "vision_tower" in name and name.endswith("k_proj.bias"):
                continue  # it adds the same to all scores of a query: its gradient is nothing but rounding
            torch.testing.assert_close(
                tensor, other_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=f"{stage} {name}": f"{n}: {m}"
            )
    tokens = [
        [stage["tokens"] for stage in json.loads((tmp_path / run / "pipeline.json").read_text())["stages"]]
        for run in ("alone", "together")
    ]
    assert tokens[0] == tokens[1]
    again = command("train", tmp_path / "together.yaml", "--out", tmp_path / "together")
    assert again.code == 0  # what two processes wrote, one process reads
    assert "stage dft: done, skipped" in again.err


def test_a_wrong_recipe_ends_both_processes(tiny, tmp_path):
    tree = mixed_tree(tiny)
    tree["teacher"]["path"] = str(tmp_path / "nowhere")
    code, err = torchrun(tiny.recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run")
    assert code == 1
    assert "nowhere" in err
