"""A stage that is told to stop stops after the step in progress, also when that step is the last."""

import json
import multiprocessing
import os
import signal

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from llavakd.config import StudentConfig, parse_recipe
from llavakd.data.collate import RowDataset, Source
from llavakd.data.samples import load_samples
from llavakd.models.student import build_student
from llavakd.progress import Interrupted
from llavakd.train import loop
from llavakd.train.step import StudentModule, TrainState, build_optimizer


@pytest.fixture
def start_stage(request, tiny, tmp_path):
    """A function that begins or goes on with a stage of four steps in one folder, as a new process would."""
    tree = tiny.tree()
    changes = {"workers": 0, "micro_batch_size": 1} | getattr(request, "param", {})
    tree["workers"] = changes.pop("workers")
    tree["stages"] = [tree["stages"][1] | {"data": "mixed", "epochs": 1} | changes]
    tree["data"]["mixed"]["max_length"] = 160
    recipe = parse_recipe(tree)
    (stage,) = recipe.stages
    student_config = StudentConfig(
        vision_tower=str(tiny.tower),
        language_model=str(tiny.language_model),
        from_scratch=("vision_tower", "language_model"),
    )

    def start():
        student = build_student(student_config, seed=0)
        student.train_only(stage.train)
        module = StudentModule(student, stage, None)
        accelerator = Accelerator(cpu=True)
        module, optimizer = accelerator.prepare(module, build_optimizer(module, stage))
        data = recipe.data["mixed"]
        source = Source(samples=load_samples(data), renderer=student.renderer(data), data=data)
        dataset = RowDataset([source], image_processor=student.image_processor)
        parts = {"module": module, "optimizer": optimizer, "student": student}
        state = TrainState(accelerator=accelerator, teacher=None, pair=None, stage=stage, **parts)
        return loop.run_stage(state, dataset, recipe, tmp_path)

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("last", [1, 3, 4])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_stage_after_its_step_and_the_next_start_goes_on(monkeypatch, start_stage, last, number):
    steps, tokens = [], []

    def step_with_signal(state, batches, *, step):
        steps.append(step)
        result = train_step(state, batches, step=step)
        tokens.append(result.counted["tokens"])
        if step + 1 == last and len(steps) == last:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is before  # once more would stop at once
        return result

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step_with_signal)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=rf"stage sft stopped after step {last} of 4"):
        start_stage()
    assert signal.getsignal(number) is before
    progress = start_stage()
    assert progress.step == 4
    assert steps == [0, 1, 2, 3]
    assert progress.counted["tokens"] == sum(tokens)


@pytest.mark.parametrize("start_stage", [{"workers": 2}], indirect=True)
def test_readers_in_other_processes_outlive_the_ctrl_c_that_reaches_them_too(monkeypatch, start_stage):
    def step_after_signal(state, batches, *, step):
        if step == 0:  # rows of the later steps are not read yet
            readers = multiprocessing.active_children()
            assert len(readers) == 2
            for reader in readers:
                os.kill(reader.pid, signal.SIGINT)
        return train_step(state, batches, step=step)

    train_step = loop.train_step
    monkeypatch.setattr(loop, "train_step", step_after_signal)
    assert start_stage().step == 4


@pytest.mark.parametrize(
    "start_stage", [{"micro_batch_size": None, "max_tokens_per_batch": 160, "workers": 2}], indirect=True
)
def test_a_packed_stage_works_on_packs_of_all_rows_of_a_step(monkeypatch, start_stage):
    def step_on_packs(state, batches, *, step):
        assert 1 < len(batches) < 8
        for batch in batches:
            assert batch.input_ids.shape == batch.position_ids.shape
            assert len(batch.input_ids) == 1
            assert batch.input_ids.shape[1] <= 160
        rows = [name for batch in batches for name in batch.sample_ids]
        assert len(rows) == 8
        seen.extend(rows)
        return train_step(state, batches, step=step)

    train_step, seen = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", step_on_packs)
    assert start_stage().step == 4
    assert len(set(seen)) == 32


def test_a_finished_stage_takes_no_further_step(monkeypatch, start_stage):
    first = start_stage()
    monkeypatch.setattr(loop, "train_step", None)
    assert start_stage() == first


def test_every_step_is_logged_once_with_its_rate_also_after_a_sitting_that_logged_what_it_did_not_save(
    monkeypatch, start_stage, tmp_path
):
    def step_until_killed(state, batches, *, step):
        if step == 3:
            raise RuntimeError("killed")
        return train_step(state, batches, step=step)

    train_step, metrics = loop.train_step, tmp_path / "metrics.jsonl"
    monkeypatch.setattr(loop, "train_step", step_until_killed)
    with pytest.raises(RuntimeError, match="killed"):
        start_stage()
    whole = metrics.read_text()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [1, 2, 3]  # of which two are saved
    metrics.write_text(whole + whole[:40])
    monkeypatch.setattr(loop, "train_step", train_step)
    start_stage()
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["lr"] for line in lines] == pytest.approx([0.0, 1.0e-3, 0.75e-3, 0.25e-3])  # warm-up of one step
