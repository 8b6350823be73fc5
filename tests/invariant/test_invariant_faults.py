"""Through the command line: what breaks outside ends with one message, and the same command goes on to the same weights."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_invariant_interruption import assert_same_run, long_recipe, uninterrupted, wait_for_step

assert uninterrupted  # a fixture: the run that nobody disturbs


def start(recipe: Path, out: Path, largest_file: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """The command in a process of its own, which can write no larger file."""
    return subprocess.Popen(
        [sys.executable, "-m", "llavakd", "train", str(recipe), "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2),
    )


def assert_refused(code: int, err: str, *said: str) -> None:
    assert code == 1, err
    assert "Traceback" not in err
    for words in ("error: ", *said):
        assert words in err


def children(pid: int) -> list[int]:
    """Processes that were started by this one and run."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = place.read_text().rpartition(") ")
        except OSError:
            continue
        if int(rest.split()[1]) == pid and rest[0] != "Z":
            found.append(int(name.split()[0]))
    return found


def test_a_disk_that_is_full_leaves_what_was_whole(tiny, command, tmp_path, uninterrupted):
    newest = max((uninterrupted / "sft" / "checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    size = (newest / "optimizer.pt").stat().st_size
    model = (uninterrupted / "dpt" / "model" / "model.safetensors").stat().st_size
    assert model < size - 1, "the first stage must fit, the second not"
    recipe = long_recipe(tiny, tmp_path)
    process = start(recipe, tmp_path / "run", largest_file=size - 1)
    _, err = process.communicate(timeout=120)
    assert_refused(process.returncode, err, "cannot write", "step-2", "make room")
    assert list((tmp_path / "run" / "sft" / "checkpoints").iterdir()) == []
    stages = json.loads((tmp_path / "run" / "pipeline.json").read_text())["stages"]
    assert [(stage["name"], stage["state"]) for stage in stages] == [("dpt", "done"), ("sft", "running")]
    done = command("train", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_reading_process_that_dies_is_named(tiny, command, tmp_path, uninterrupted):
    recipe = long_recipe(tiny, tmp_path, workers=2)
    process = start(recipe, tmp_path / "run")
    wait_for_step(tmp_path / "run" / "dpt" / "metrics.jsonl", 3, process.poll)  # so step 2 is saved
    # Again and again: on a slow machine the first may hit a stage that has been given all its rows already.
    while process.poll() is None:
        for reader in children(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(reader, signal.SIGKILL)
        time.sleep(0.01)
    _, err = process.communicate(timeout=120)
    assert_refused(process.returncode, err, "a process of this run was lost: ")
    done = command("train", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "resuming after step" in done.err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_reading_process_that_dies_while_data_is_looked_at_is_named(tiny, command, tmp_path):
    rows, many = json.loads((tiny.world / "instruct.json").read_text()), tmp_path / "many.json"
    many.write_text(json.dumps(rows * (40_000 // len(rows))))  # so many that it is at work when it is killed
    process = command.start("check", "--data", many, "--images", tiny.world / "images", "--workers", 2)
    deadline = time.monotonic() + 60
    while not (readers := children(process)) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(1)  # torch imports something over the first row, and would log that a signal came in between
    for reader in readers:
        os.kill(reader, signal.SIGKILL)
    done = command.finish()
    assert_refused(done.code, done.err, "a process of this run was lost: DataLoader worker")


def test_a_picture_folder_that_vanishes_stops_the_run(tiny, command, tmp_path, uninterrupted):
    world, away = tmp_path / "world", tmp_path / "away"
    shutil.copytree(tiny.world, world)
    recipe = long_recipe(tiny, tmp_path)
    recipe.write_text(recipe.read_text().replace(str(tiny.world / "images"), str(world / "images")))
    process = start(recipe, tmp_path / "run")
    wait_for_step(tmp_path / "run" / "dpt" / "metrics.jsonl", 2, process.poll)
    (world / "images").rename(away)
    _, err = process.communicate(timeout=120)
    assert_refused(process.returncode, err, "left out: ", "cannot read picture", "max_bad_rows")
    assert "No such file" in err
    away.rename(world / "images")
    done = command("train", recipe, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_loss_that_is_not_finite_stops_before_it_is_learnt(tiny, command, tmp_path):
    recipe = long_recipe(tiny, tmp_path)
    done = command("train", recipe, "stages.sft.learning_rate=1e30", "--out", tmp_path / "run")
    assert_refused(done.code, done.err, "stage sft, step", "gradient norm is", "lower learning_rate")
    lines = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] == json.loads(line)["loss"] for line in lines)


@pytest.mark.parametrize("name", ["learning.safetensors", "state.json", "manifest.json"])
def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(tiny, command, tmp_path, uninterrupted, name):
    shutil.copytree(uninterrupted, tmp_path / "run")
    ledger = json.loads((tmp_path / "run" / "pipeline.json").read_text())
    ledger["stages"][2] = {key: ledger["stages"][2][key] for key in ("name", "fingerprint")} | {"state": "running"}
    (tmp_path / "run" / "pipeline.json").write_text(json.dumps(ledger))
    shutil.rmtree(tmp_path / "run" / "dft" / "model")
    places = (tmp_path / "run" / "dft" / "checkpoints").iterdir()
    newest = max(places, key=lambda path: int(path.name.split("-")[1])) / name
    newest.write_bytes(newest.read_bytes()[:-3])
    done = command("train", long_recipe(tiny, tmp_path), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert "is torn; using the one before it" in done.err
    assert_same_run(tmp_path / "run", uninterrupted)
