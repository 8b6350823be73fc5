"""The loop of one stage: data in order, step, log, checkpoint, and a clean stop on Ctrl-C."""

import json
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llavakd.config import Recipe, StageConfig
from llavakd.data.collate import Batch, RowDataset, collate_step
from llavakd.data.readers import reading
from llavakd.data.sampler import micro_batches
from llavakd.data.samples import too_many
from llavakd.errors import UserError
from llavakd.progress import Interrupted, bar, say
from llavakd.templates import render
from llavakd.train.checkpoint import load_checkpoint, newest_whole, prune, save_checkpoint, write_text
from llavakd.train.step import StepResult, TrainState, check_finite, learning_rate, set_learning_rate, train_step


@dataclass
class Progress:
    """What a checkpoint remembers beside weights; `counted` sums up StepResult's over all sittings of the stage."""

    step: int = 0
    seconds: float = 0.0
    counted: dict[str, int] = field(default_factory=dict)


def total_steps(rows: int, stage: StageConfig) -> int:
    """Optimiser steps of a stage: whole global batches only, at least one; raises UserError where there is none."""
    per_epoch = rows // stage.global_batch_size
    if not per_epoch:
        told = f"data source {' + '.join(stage.sources)!r} has {rows} rows"
        raise UserError(f"{told}, fewer than global_batch_size {stage.global_batch_size}; lower it")
    return max(1, round(per_epoch * stage.epochs))


def micro_batch_size(stage: StageConfig, *, processes: int) -> int:
    """Rows that a process holds at once, all of its share where they are packed; UserError where that does not divide."""
    micro = stage.micro_batch_size or max(1, stage.global_batch_size // processes)
    if stage.global_batch_size % (micro * processes):
        told = f"stage {stage.name}: global_batch_size {stage.global_batch_size} is not a multiple of"
        raise UserError(f"{told} {processes} processes x micro_batch_size {micro}; change one of them")
    return micro


def run_stage(state: TrainState, dataset: RowDataset, recipe: Recipe, folder: Path) -> Progress:
    """Train a stage to its end, from its newest checkpoint on; raises Interrupted, once saved, and UserError."""
    stage, accelerator, main = state.stage, state.accelerator, state.accelerator.is_main_process
    steps, checkpoints = total_steps(len(dataset), stage), folder / "checkpoints"
    learning: dict[str, Any] = {"module": accelerator.unwrap_model(state.module), "optimizer": state.optimizer}
    found = newest_whole(checkpoints)
    progress = Progress(**load_checkpoint(found, **learning)) if found else Progress()
    processes = accelerator.num_processes
    micro = micro_batch_size(stage, processes=processes)
    accumulation = stage.global_batch_size // (micro * processes)
    if main:
        known = {"steps": steps, "rows": len(dataset), "processes": processes, "micro": micro, "done": progress.step}
        say(render("stage.jinja", stage=stage, accumulation=accumulation, **known))
        _drop_later_metrics(folder / "metrics.jsonl", progress.step)
    window: list[StepResult] = []
    started, logged = time.perf_counter() - progress.seconds, progress.seconds
    read = _read(state, dataset, recipe, start=progress.step, steps=steps, micro_batch_size=micro)
    with bar(stage.name, steps, shown=main) as advance, _stop_signals() as stop, read as batches:
        while progress.step < steps:
            set_learning_rate(state.optimizer, learning_rate(progress.step, steps=steps, stage=stage))
            together = [batch for _ in range(accumulation) for batch in next(batches)]
            together = [state.stored.add(batch) for batch in together] if state.stored else together
            window.append(train_step(state, together, step=progress.step))
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            _add_up(progress, window[-1].counted, together, recipe.max_bad_rows, steps * stage.global_batch_size)
            last = progress.step == steps
            # On all processes after the same step; a sum on the CPU, which no device is waited for.
            stopping = bool(accelerator.reduce(torch.tensor(int(stop.is_set()))))
            saves = stopping or last or progress.step % recipe.save_every == 0
            logs = last or progress.step % recipe.log_every == 0
            if saves or logs:
                check_finite(window, stage)
            if logs:
                if main:
                    loss = _log(state, folder, progress, window, progress.seconds - logged)
                    advance(progress.step, f"loss {loss:.3f}")
                window, logged = [], progress.seconds
            if saves:
                save_checkpoint(checkpoints if main else None, **learning, state=vars(progress))
                if main:
                    prune(checkpoints, keep=2)
                accelerator.wait_for_everyone()
            if stopping:
                said = f"stage {stage.name} stopped after step {progress.step} of {steps}"
                raise Interrupted(f"{said}; the same command goes on from there")
    return progress


def _add_up(progress: Progress, counted: dict[str, int], batches: list[Batch], allowed: float, rows: int) -> None:
    """Count a step's rows in and say which were left out; raises DataError where they are too many of the stage's."""
    mistakes = [mistake for batch in batches for mistake in batch.mistakes]
    for mistake in mistakes:
        say(mistake)
    progress.counted = {name: progress.counted.get(name, 0) + count for name, count in counted.items()}
    if progress.counted["left_out"] > allowed * rows:
        raise too_many(mistakes, progress.counted["left_out"], rows, allowed)


def _log(state: TrainState, folder: Path, progress: Progress, window: list[StepResult], seconds: float) -> float:
    """Means over the steps since the last line of metrics.jsonl, and their loss; only now is the device read."""
    accelerator, stage = state.accelerator, state.stage.name
    steps = [{"loss": one.loss, **one.parts, "grad_norm": one.grad_norm} for one in window]
    means = {name: float(torch.stack([one[name].float() for one in steps]).mean()) for name in steps[0]}
    tokens, cuda = sum(one.counted["tokens"] for one in window), accelerator.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    means |= {"tokens_per_s": tokens / seconds, "lr": state.optimizer.param_groups[0]["lr"], "memory_gib": peak / 2**30}
    means |= {name: progress.counted[name] for name in ("truncated", "left_out")}
    values = {name: round(value, 8) for name, value in means.items()}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "step": progress.step, **values}) + "\n")
    accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=progress.step)
    return values["loss"]


def _drop_later_metrics(path: Path, step: int) -> None:
    """A killed sitting may have logged past its last checkpoint, and its last line may be torn."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        write_text(path, "".join(kept))


def _read(state: TrainState, dataset: RowDataset, recipe: Recipe, **order: Any) -> AbstractContextManager[Any]:
    """What this process reads of the stage, a list of batches at a time; `order` as micro_batches takes it."""
    stage, accelerator = state.stage, state.accelerator
    order |= {"global_batch_size": stage.global_batch_size, "grouping": stage.grouping, "seed": recipe.seed}
    order |= {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    how = {"pad_token_id": state.student.tokenizer.pad_token_id, "max_tokens": stage.max_tokens_per_batch}
    options: dict[str, Any] = {"num_workers": recipe.workers, "pin_memory": accelerator.device.type == "cuda"}
    # A generator of its own: drawing worker seeds must not move the training's random state.
    options |= {"generator": torch.Generator().manual_seed(recipe.seed), "collate_fn": partial(collate_step, **how)}
    return reading(dataset, batch_sampler=micro_batches(dataset.lengths, **order), **options)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one acts as usual."""
    stop = threading.Event()
    with ExitStack() as usual:

        def note(_number: int, _frame: Any) -> None:
            usual.close()
            stop.set()
            say("stopping after this step; once more to stop at once")

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                usual.callback(signal.signal, number, signal.signal(number, note))
        yield stop
