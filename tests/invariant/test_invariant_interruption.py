"""Through the command line: a run that was stopped, however rudely, ends with the bits of one that was not."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

STAGES = ("dpt", "sft", "dft")


def long_recipe(tiny, folder, **changes):
    """More steps than usual, and some with accumulated gradients."""
    tree = tiny.tree() | changes
    tree["stages"][1]["micro_batch_size"] = 4
    for stage in tree["stages"]:
        stage["epochs"] = 1.5
    return tiny.recipe(folder / "recipe.yaml", tree)


@pytest.fixture(scope="module")
def uninterrupted(tiny, command, tmp_path_factory):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    done = command("train", long_recipe(tiny, folder), "--out", folder / "run")
    assert done.code == 0, done.err
    return folder / "run"


def lines_of(run, stage):
    """metrics.jsonl without what a clock or the machine decides."""
    lines = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_s", "memory_gib")} for line in lines]


def assert_same_run(run, other):
    for stage in STAGES:
        left, right = (load_file(str(folder / stage / "model" / "model.safetensors")) for folder in (run, other))
        assert left.keys() == right.keys()
        differing = [name for name in left if left[name].numpy().tobytes() != right[name].numpy().tobytes()]
        assert not differing, stage
        assert lines_of(run, stage) == lines_of(other, stage)
    tokens = [
        [stage["tokens"] for stage in json.loads((f / "pipeline.json").read_text())["stages"]] for f in (run, other)
    ]
    assert tokens[0] == tokens[1]


def wait_for_step(metrics, step, alive):
    deadline = time.monotonic() + 90
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= step):
        assert alive() is None, "ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_ctrl_c_saves_and_says_so_and_the_same_command_ends_as_if_nothing_had_been(
    tiny, command, tmp_path, uninterrupted
):
    """A whole process group gets the signal, as from a terminal, readers in other processes included."""
    recipe = long_recipe(tiny, tmp_path, workers=2, save_every=1000)
    process = subprocess.Popen(
        [sys.executable, "-m", "llavakd", "train", str(recipe), "--out", str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "run" / "sft" / "metrics.jsonl", 2, process.poll)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "stopping after this step" in err
    assert "stage sft stopped after step" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err + out
    (checkpoint,) = (tmp_path / "run" / "sft" / "checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert step == len(lines_of(tmp_path / "run", "sft"))
    done = command("train", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "stage dpt: done, skipped" in done.err
    assert f"resuming after step {step}" in done.err
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_in_the_middle_of_a_stage_exits_130(tiny, command, tmp_path, number):
    pid = command.start("train", long_recipe(tiny, tmp_path), "--out", tmp_path / "run")
    wait_for_step(tmp_path / "run" / "dpt" / "metrics.jsonl", 1, lambda: None)
    os.kill(pid, number)
    stopped = command.finish()
    assert stopped.code == 130, stopped.err
    assert "Traceback" not in stopped.err


def test_ctrl_c_at_any_moment_exits_130_and_loses_nothing(tiny, command, tmp_path, uninterrupted):
    """Also while models are loaded or written, before and between the loops that save."""
    recipe, moments = long_recipe(tiny, tmp_path), random.Random(1)
    stops = []
    for _ in range(10):
        pid = command.start("train", recipe, "--out", tmp_path / "run")
        time.sleep(moments.uniform(0.3, 0.9))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
        stopped = command.finish()
        if "Done: " in stopped.out:  # nothing was left to stop
            break
        # On a slow machine Python itself may die of the signal before the command begins: 130 to a shell, too.
        assert stopped.code in (130, -signal.SIGINT), stopped.err
        assert stopped.code == -signal.SIGINT or "the same command goes on from" in stopped.err
        stops.append(stopped.code)
    assert command("train", recipe, "--out", tmp_path / "run").code == 0
    assert stops
    assert_same_run(tmp_path / "run", uninterrupted)


def steps_of(run):
    """How many steps the whole run has logged."""
    return sum(len(path.read_text().splitlines()) for path in run.glob("*/metrics.jsonl"))


def test_kill_9_at_20_moments_loses_nothing(tiny, command, tmp_path, uninterrupted):
    """Some while models are loaded, some while a step, a checkpoint or a model is being made."""
    recipe, run, moments = long_recipe(tiny, tmp_path, save_every=1), tmp_path / "run", random.Random(9)
    last = steps_of(uninterrupted) - 3  # near the end runs are killed at once, for none may finish
    for kill in range(20):
        pid = command.start("train", recipe, "--out", run)
        wanted = min(steps_of(run) + moments.randint(1, 4), last)
        deadline = time.monotonic() + moments.choice((moments.uniform(0.02, 0.6), 60))
        while time.monotonic() < deadline and steps_of(run) < wanted:
            assert os.path.exists(f"/proc/{pid}/stat"), "ended before it was killed"
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.03))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        ended = command.finish()
        assert ended.code == -signal.SIGKILL, f"kill {kill}: {ended.err}"
    before = steps_of(run)
    assert command("train", recipe, "--out", run).code == 0
    assert before > len(lines_of(run, "dpt")), "no kill came after the first stage"
    assert_same_run(run, uninterrupted)
