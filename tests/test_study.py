"""The study's tasks: what needs what, what must not run twice at once, and what is left when one fails or time is up."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import pytest
import study
import study_tables
from side_by_side import Task, run


def notes(folder, log, *, names):
    """Tasks NAME that write down when they begin and end, and make the folder NAME.made."""

    def call(name, *, fails=False):
        log.append(f"{name} begins")
        time.sleep(0.05)
        if fails:
            raise RuntimeError("broken")
        (folder / f"{name}.made").mkdir()
        log.append(f"{name} ends")
        return name

    return {name: Task(name=name, call=call, arguments=(name,), makes=(folder / f"{name}.made",)) for name in names}


def begin(tasks, **how):
    kept = []
    with ThreadPoolExecutor(4) as pool:
        failed = run(tasks, pool, slots=how.pop("slots", 4), keep=kept.append, **how)
    return kept, failed


def test_a_task_waits_for_what_it_needs(tmp_path):
    log: list[str] = []
    made = notes(tmp_path, log, names="ab")
    late = Task(name="b", call=made["b"].call, arguments=("b",), needs=(tmp_path / "a.made",))
    assert begin([late, made["a"]]) == (["a", "b"], [])
    assert log == ["a begins", "a ends", "b begins", "b ends"]


def test_two_that_would_make_the_same_do_not_run_at_once(tmp_path):
    busy, most, lock = [0], [0], threading.Lock()

    def call(*made):
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        time.sleep(0.03)
        with lock:
            busy[0] -= 1
            for path in made:
                path.mkdir(exist_ok=True)

    def task(name, *made):
        paths = tuple(tmp_path / one for one in made)
        return Task(name=name, call=call, arguments=paths, makes=paths)

    assert begin([task("x", "pt"), task("y", "pt")])[1] == []
    assert most == [1]
    # Once the first stage is there, what differs is made side by side.
    assert begin([task("x", "pt", "sft"), task("y", "pt", "dft")])[1] == []
    assert most == [2]


def test_a_failure_leaves_the_others_and_is_told_with_what_needed_it(tmp_path):
    made = notes(tmp_path, [], names="abc")
    broken = Task(name="a", call=lambda: made["a"].call("a", fails=True), arguments=(), makes=made["a"].makes)
    after = Task(name="c", call=made["c"].call, arguments=("c",), needs=made["a"].makes)
    kept, failed = begin([broken, after, made["b"]])
    assert kept == ["b"]
    assert failed == ["a: RuntimeError: broken", "c: not what it needs"]


def test_none_is_begun_when_time_is_up(tmp_path):
    kept, failed = begin(notes(tmp_path, [], names="ab").values(), minutes=0)
    assert (kept, failed) == ([], ["a: not begun in time", "b: not begun in time"])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_sitting_and_is_told(tmp_path):
    tasks = [Task(name=name, call=killed, arguments=()) for name in "abc"]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        failed = run(tasks, pool, slots=1, keep=print)
    assert failed[0].startswith("a: BrokenProcessPool")
    assert failed[1:] == ["b: not begun in time", "c: not begun in time"]


def test_runs_of_one_seed_share_their_first_stages_and_no_others(tmp_path):
    def kept(cell, seed=31):
        return study.kept_of(*study.recipe_of(study.CELLS[cell[0]][cell[1]], seed, tmp_path))

    control, late = kept(("recipes", "pt-sft-sft")), kept(("recipes", "pt-sft-dft"))
    full, response = kept(("recipes", "dpt-sft-dft")), kept(("losses", "response"))
    assert control[:2] == late[:2]
    assert control[2] != late[2]
    assert full[0] != response[0]
    assert not set(control) & set(kept(("recipes", "pt-sft-sft"), 32))
    assert not set(control) & set(kept(("data", "3,000 scenes, control")))


@pytest.mark.parametrize("folder", study_tables.FOLDERS)
def test_every_line_is_of_a_cell_and_says_where_it_ran(folder):
    for file in (study_tables.LINES / folder).glob("*.jsonl"):
        for line in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            assert {"seconds", "device", "commit", "torch", "by_type", "segments", "steps"} <= line.keys()
            assert "dirty" not in line["commit"]
            if folder == "study":
                assert line["cell"] in study.PARTS[line["part"]]


def test_all_rows_of_a_comparison_took_as_many_steps():
    cells = study_tables.cells()
    for name in ("recipes/dpt-sft-dft", "recipes/dpt-dft-dft", "losses/response", "teachers/weak", "divergences/jsd"):
        for seed, line in cells[name].items():
            assert line["steps"] == cells["recipes/pt-sft-sft"][seed]["steps"]
