"""Processes that share every global batch train what one process trains, however they hold the models."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from llavakd.config import load_recipe
from llavakd.errors import UserError
from llavakd.models.student import load_student
from llavakd.pipeline import run_pipeline
from llavakd.train.zero import ZeroAdamW

pytestmark = pytest.mark.dist

PARTS = ("loss", "ce", "response_kl", "visual_kl", "relation", "grad_norm", "lr")
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def mixed_tree(tiny):
    """Three short stages on rows with no, one and two pictures: the projector alone, then the rest, by both reductions.

    Micro-batches of one row, so that some hold no picture on one process while the other's does. The rate is small: AdamW
    moves a weight by about the rate whatever its gradient, also where that is but rounding.
    """
    tree = tiny.tree()
    for stage, reduction in zip(tree["stages"], ("sample", "token", "sample"), strict=True):
        stage |= {"data": "mixed", "grouping": "none", "epochs": 1, "learning_rate": 1.0e-4, "reduction": reduction}
        stage |= {"global_batch_size": 8, "warmup_ratio": 0.0}
    tree["data"]["mixed"]["max_length"] = 200
    tree["save_every"] = 1
    return tree


def untied(language_model: Path, folder: Path) -> Path:
    """A copy of a language model with a head of its own."""
    shutil.copytree(language_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")
    return folder


def torchrun(recipe, out):
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "llavakd", "train", str(recipe), "--out", str(out)),
        ],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        told, err = process.communicate(timeout=120)
    finally:
        process.terminate()  # which ends the two as well
    assert told.count("Done: ") == (process.wait() == 0), "one of them tells"
    return process.wait(), err


def start_two(*argv):
    """Two processes of one run, as torchrun would start them, each to be killed by itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, *map(str, argv)],
            env=os.environ | ENVIRONMENT | place | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


def finish(processes):
    """(exit code, output, errors) of each."""
    try:
        told = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *each) for process, each in zip(processes, told, strict=True)]


def assert_same_run(run: Path, other: Path):
    for stage in ("dpt", "sft", "dft"):
        lines, other_lines = (
            [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
            for folder in (run, other)
        )
        assert [line["step"] for line in lines] == [line["step"] for line in other_lines] == [1, 2, 3, 4]
        for line, other_line in zip(lines, other_lines, strict=True):
            values, others = ({part: entry[part] for part in PARTS if part in entry} for entry in (line, other_line))
            assert values == pytest.approx(others, rel=2e-5, abs=1e-7), (stage, line["step"])
        weights, other_weights = (
            load_student(str(folder / stage / "model")).model.state_dict() for folder in (run, other)
        )
        for name, tensor in weights.items():
            if "vision_tower" in name and name.endswith("k_proj.bias"):
                continue  # it adds the same to all scores of a query: its gradient is nothing but rounding
            torch.testing.assert_close(
                tensor, other_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=f"{stage} {name}": f"{n}: {m}"
            )
    tokens = [
        [stage["tokens"] for stage in json.loads((folder / "pipeline.json").read_text())["stages"]]
        for folder in (run, other)
    ]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    ("sharding", "dealt"),
    [("none", "rows"), ("none", "packs"), ("student", "rows"), ("both", "packs"), ("zero2", "rows"), ("zero3", "rows")],
)
def test_two_processes_equal_one_in_every_part_of_the_loss_and_every_weight(tiny, command, tmp_path, sharding, dealt):
    """One process at once, two in micro-batches of one row, or in packs, of which they have unequally many.

    With shards there are also a tower that learns, low-rank updates, layers computed twice, and, once, a head that is not
    the embedding; without, a base in 4 bits.
    """
    tree = mixed_tree(tiny) | {"sharding": sharding}  # of which one process has no use
    if (sharding, dealt) == ("none", "rows"):
        tree["stages"][1] |= {"lora_rank": 4, "lora_base": "nf4"}
    if sharding in ("student", "zero2", "zero3"):
        tree["stages"][2]["train"].append("vision_tower")
    if sharding in ("both", "zero2", "zero3"):
        tree["stages"][1]["lora_rank"] = 4
        tree["gradient_checkpointing"] = True
    if sharding == "zero3":
        tree["student"]["language_model"] = str(untied(tiny.language_model, tmp_path / "untied"))
    alone = command("train", tiny.recipe(tmp_path / "alone.yaml", tree), "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    for stage in tree["stages"]:
        stage |= {"micro_batch_size": 1} if dealt == "rows" else {"max_tokens_per_batch": 200}
    code, err = torchrun(tiny.recipe(tmp_path / "together.yaml", tree), tmp_path / "together")
    assert code == 0, err
    share = "1 rows x 4 accumulated" if dealt == "rows" else "4 rows in packs of up to 200 tokens"
    assert err.count(f"4 steps of 8 rows = 2 processes x {share}") == 3
    assert_same_run(tmp_path / "alone", tmp_path / "together")
    again = command("train", tmp_path / "together.yaml", "--out", tmp_path / "together")
    assert again.code == 0  # what two processes wrote, one process reads
    assert "stage dft: done, skipped" in again.err


@pytest.fixture(scope="module")
def alone(tiny, command, tmp_path_factory):
    """A recipe of one row at a time, and its run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    tree = mixed_tree(tiny)
    for stage in tree["stages"]:
        stage["micro_batch_size"] = 1
    recipe = tiny.recipe(folder / "recipe.yaml", tree)
    done = command("train", recipe, "--out", folder / "run")
    assert done.code == 0, done.err
    return recipe, folder / "run"


def wait_for(path: Path, process: subprocess.Popen):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(("sharding", "victim"), [("none", 0), ("both", 1), ("zero2", 1), ("zero3", 0)])
def test_a_lost_process_ends_the_other_and_one_alone_goes_on(alone, command, tmp_path, sharding, victim):
    recipe, whole = alone
    run = ("train", recipe, f"sharding={sharding}", "--out", tmp_path / "run")
    processes = start_two("-m", "llavakd", *run)
    wait_for(tmp_path / "run" / "sft" / "checkpoints" / "step-1", processes[victim])
    processes[victim].send_signal(signal.SIGKILL)
    code, _, err = finish(processes)[1 - victim]
    assert code == 1
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "a process of this run was lost" in line
    assert line.endswith("the same command goes on from what is saved")
    done = command(*run)
    assert done.code == 0, done.err
    assert "stage sft: 4 steps of 8 rows = 1 processes" in done.err
    assert "resuming after step" in done.err
    assert "torn" not in done.err
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("sharding", ["student", "zero2", "zero3"])
def test_two_processes_go_on_in_shards_where_one_was_killed(alone, tmp_path, sharding):
    recipe, whole = alone
    process = subprocess.Popen(
        [sys.executable, "-m", "llavakd", "train", str(recipe), "--out", str(tmp_path / "run")],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "run" / "dft" / "checkpoints" / "step-1", process)
    process.kill()
    process.wait()
    run = ("train", recipe, f"sharding={sharding}", "--out", tmp_path / "run")
    for code, _, err in finish(start_two("-m", "llavakd", *run)):
        assert code == 0, err
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("sharding", ["student", "both", "zero2", "zero3"])
def test_what_is_sharded_is_held_by_halves(alone, sharding):
    recipe, _ = alone
    found = []
    for code, out, err in finish(start_two(Path(__file__).parent / "shard_sizes.py", sharding, recipe)):
        assert code == 0, err
        found.append(json.loads(out.splitlines()[-1]))
    (student, teacher), tower, layers = found[0]["whole"], found[0]["tower"], found[0]["layers"]
    held = [sum(numbers) for numbers in zip(*(one["held"] for one in found), strict=True)]
    twice = teacher - layers if sharding == "both" else teacher
    assert held == [2 * student if sharding == "zero2" else student + tower, teacher + twice]
    moving = [one["moving"] for one in found]
    assert sum(moving) == student - tower
    assert max(moving) < 0.55 * sum(moving)


def test_a_wrong_recipe_ends_both_processes(tiny, tmp_path):
    tree = mixed_tree(tiny)
    tree["teacher"]["path"] = str(tmp_path / "nowhere")
    code, err = torchrun(tiny.recipe(tmp_path / "recipe.yaml", tree), tmp_path / "run")
    assert code == 1
    assert "nowhere" in err


def test_two_processes_quantise_alike_and_refuse_together(tiny, command, tmp_path):
    tree = mixed_tree(tiny)
    tree["stages"] = tree["stages"][:1]
    tree["teacher"] |= {"quantize": "int8", "max_drift": 10.0}
    alone = command("train", tiny.recipe(tmp_path / "r.yaml", tree), "--out", tmp_path / "alone")
    assert alone.code == 0, alone.err
    code, err = torchrun(tmp_path / "r.yaml", tmp_path / "together")
    assert code == 0, err
    assert err.count("KL of the int8 teacher") == 1
    (one,), (other,) = (
        json.loads((tmp_path / name / "pipeline.json").read_text(encoding="utf-8"))["stages"]
        for name in ("alone", "together")
    )
    assert other["teacher_drift"] == pytest.approx(one["teacher_drift"], rel=1e-6)
    code, err = torchrun(tiny.recipe(tmp_path / "sharded.yaml", tree | {"sharding": "both"}), tmp_path / "sharded")
    assert code == 0, err
    losses = [
        json.loads((tmp_path / name / tree["stages"][0]["name"] / "metrics.jsonl").read_text("utf-8").splitlines()[0])
        for name in ("alone", "together", "sharded")
    ]
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-4)
    assert losses[2]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-4)
    tree["teacher"]["max_drift"] = 0.0
    code, err = torchrun(tiny.recipe(tmp_path / "refused.yaml", tree), tmp_path / "refused")
    assert code == 1
    assert "max_drift is 0.0" in err


def test_products_under_autocast_are_those_without_shards(alone, command, tmp_path):
    tree = yaml.safe_load(alone[0].read_text(encoding="utf-8")) | {"precision": "bf16"}
    del tree["stages"][:-1]
    # Weights stand still: one that bfloat16 rounds to the other side would move the steps after it.
    tree["stages"][0]["learning_rate"] = 1.0e-12
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    done = command("train", recipe, "--out", tmp_path / "whole")
    assert done.code == 0, done.err
    for code, _, err in finish(start_two("-m", "llavakd", "train", recipe, "sharding=zero3", "--out", tmp_path / "run")):
        assert code == 0, err
    steps, others = (
        [json.loads(line) for line in (tmp_path / name / "dft" / "metrics.jsonl").read_text("utf-8").splitlines()]
        for name in ("whole", "run")
    )
    for step, other in zip(steps, others, strict=True):
        assert other["loss"] == pytest.approx(step["loss"], rel=2e-6)
        assert other["grad_norm"] == pytest.approx(step["grad_norm"], rel=2e-6)


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_deepspeed_changes_no_setting_and_keeps_no_model(alone, tmp_path, sharding):
    script = Path(__file__).parent / "zero_traces.py"
    for code, out, err in finish(
        start_two(script, "train", alone[0], f"sharding={sharding}", "--out", tmp_path / "run")
    ):
        assert code == 0, err
        assert "Warning" not in err
        told = json.loads(out.splitlines()[-1])
        assert told.pop("whole") <= 1  # at the end of any forward: the head, which is used outside of its module
        assert told == {"changed": [], "stages": 3, "kept": 0}


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_ends_both_processes(alone, tmp_path, sharding):
    changes = (f"sharding={sharding}", "stages.dpt.learning_rate=1.0e30")
    processes = start_two("-m", "llavakd", "train", alone[0], *changes, "--out", tmp_path / "run")
    ended = finish(processes)
    # Each tells, whichever ends first; the other may be aborted where torch finds it gone at the exit.
    assert {code for code, *_ in ended} in ({1}, {1, -signal.SIGABRT})
    for _, _, err in ended:
        assert "Traceback" not in err
        assert "stage dpt, step 1: gradient norm is inf, parts {'ce': " in err


def test_without_deepspeed_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    layer = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"sharding: zero3 needs deepspeed \(.+\); .* 'llava-kd\[deepspeed\]'"):
        ZeroAdamW(layer, torch.optim.AdamW(layer.parameters()), sharding="zero3", max_grad_norm=1.0)


@pytest.mark.parametrize(("wrapper", "named"), [("DEEPSPEED", "zero2 or zero3"), ("FSDP", "student")])
def test_wrappers_of_accelerates_own_are_refused(alone, tmp_path, monkeypatch, wrapper, named):
    monkeypatch.setenv(f"ACCELERATE_USE_{wrapper}", "true")  # as `accelerate launch` does by its configuration
    with pytest.raises(UserError, match=f"{wrapper}; start with torchrun instead and set sharding: {named}"):
        run_pipeline(load_recipe(alone[0]), tmp_path)
