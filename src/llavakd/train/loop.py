"""The loop of one stage: data in order, step, log, checkpoint, and a clean stop on Ctrl-C."""

from __future__ import annotations

import functools
import json
import resource
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from torch.utils.data import DataLoader

from llavakd.config import Recipe, StageConfig
from llavakd.data.collate import Batch, RowDataset, collate
from llavakd.data.sampler import MicroBatches, Shard
from llavakd.data.samples import too_many
from llavakd.errors import UserError
from llavakd.progress import Interrupted, bar, say
from llavakd.train.checkpoint import load_checkpoint, newest_whole, prune, save_checkpoint, write_text
from llavakd.train.optim import learning_rate, set_learning_rate
from llavakd.train.step import StepResult, TrainState, train_step


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
        raise UserError(
            f"data source {' + '.join(stage.sources)!r} has {rows} rows, fewer than global_batch_size "
            f"{stage.global_batch_size}; lower it"
        )
    return max(1, round(per_epoch * stage.epochs))


def run_stage(state: TrainState, dataset: RowDataset, recipe: Recipe, folder: Path) -> Progress:
    """Train one stage to its end, going on from its newest whole checkpoint.

    Raises Interrupted after Ctrl-C or SIGTERM, once the step is saved, and DataError after too many rows left out.
    """
    stage, accelerator = state.stage, state.accelerator
    steps = total_steps(len(dataset), stage)
    progress = _restore(state, folder)
    shard = shard_of(recipe, stage.name, rank=accelerator.process_index, world_size=accelerator.num_processes)
    accumulation = stage.global_batch_size // (shard.micro_batch_size * shard.world_size)
    main = accelerator.is_main_process
    if main:
        say(
            f"stage {stage.name}: {steps} steps of {stage.global_batch_size} rows = {shard.world_size} processes x "
            f"{shard.micro_batch_size} rows x {accumulation} accumulated; {len(dataset)} rows, "
            f"{len(dataset) % stage.global_batch_size} left out of each epoch"
            + (f"; resuming after step {progress.step}" if progress.step else "")
        )
        _drop_later_metrics(folder / "metrics.jsonl", progress.step)
    batches = _batches(dataset, recipe, state, shard, progress.step, steps)
    window: list[StepResult] = []
    logged = time.perf_counter()
    started = logged - progress.seconds
    with bar(stage.name, steps, shown=main) as advance, _stop_signals() as stopped:
        while progress.step < steps:
            set_learning_rate(state.optimizer, rate := learning_rate(progress.step, steps=steps, stage=stage))
            micro_batches = [next(batches) for _ in range(accumulation)]
            window.append(train_step(state, micro_batches, step=progress.step))
            progress.step += 1
            _add_up(progress, window[-1].counted, micro_batches, recipe.max_bad_rows, steps * stage.global_batch_size)
            progress.seconds = time.perf_counter() - started
            if progress.step % recipe.log_every == 0 or progress.step == steps:
                means = _means(window, time.perf_counter() - logged)
                window, logged = [], time.perf_counter()
                if main:
                    _log(folder, accelerator, stage.name, progress, rate, means)
                advance(progress.step, f"loss {means['loss']:.3f}")
            stopping = _any_rank(accelerator, bool(stopped))
            if stopping or progress.step % recipe.save_every == 0 or progress.step == steps:
                _save(state, folder, progress)
            if stopping:
                raise Interrupted(
                    f"stage {stage.name} stopped after step {progress.step} of {steps}; "
                    "the same command goes on from there"
                )
    return progress


def _add_up(progress: Progress, counted: dict[str, int], batches: list[Batch], allowed: float, rows: int) -> None:
    """Count a step's rows in and say which were left out; raises DataError where they are too many of the stage's."""
    mistakes = [mistake for batch in batches for mistake in batch.mistakes]
    for mistake in mistakes:
        say(mistake)
    progress.counted = {name: progress.counted.get(name, 0) + count for name, count in counted.items()}
    if progress.counted["left_out"] > allowed * rows:
        raise too_many(mistakes, progress.counted["left_out"], rows, allowed)


def _means(window: list[StepResult], seconds: float) -> dict[str, float]:
    """Over the steps since the last line of metrics.jsonl; only now is anything read off the device."""
    values = [{"loss": one.loss, **one.parts, "grad_norm": one.grad_norm} for one in window]
    means = {name: float(torch.stack([one[name].float() for one in values]).mean()) for name in values[0]}
    return means | {"tokens_per_s": sum(one.counted["tokens"] for one in window) / seconds}


def shard_of(recipe: Recipe, stage_name: str, *, rank: int, world_size: int) -> Shard:
    """This process's share of a global batch; raises UserError where it does not divide."""
    stage = recipe.stage(stage_name)
    micro = stage.micro_batch_size or max(1, stage.global_batch_size // world_size)
    if stage.global_batch_size % (micro * world_size):
        raise UserError(
            f"stage {stage_name}: global_batch_size {stage.global_batch_size} is not a multiple of {world_size} "
            f"processes x micro_batch_size {micro}; change one of them"
        )
    return Shard(rank=rank, world_size=world_size, micro_batch_size=micro)


def _batches(
    dataset: RowDataset, recipe: Recipe, state: TrainState, shard: Shard, start: int, steps: int
) -> Iterator[Batch]:
    sampler = MicroBatches(
        dataset.lengths,
        global_batch_size=state.stage.global_batch_size,
        grouping=state.stage.grouping,
        seed=recipe.seed,
        shard=shard,
        start=start,
        steps=steps,
    )
    # A generator of its own: drawing worker seeds must not move the training's random state.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=recipe.workers,
        generator=torch.Generator().manual_seed(recipe.seed),
        collate_fn=functools.partial(collate, pad_token_id=state.student.tokenizer.pad_token_id),
        pin_memory=state.accelerator.device.type == "cuda",
        worker_init_fn=_ignore_interrupt,
    )
    return _plain_errors(iter(loader))


def _plain_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same batches; an error of the user's that a worker met loses the traceback that torch writes into its text."""
    try:
        yield from batches
    except UserError as error:
        raise type(error)(str(error).strip().rpartition(f"{type(error).__name__}: ")[2]) from None


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches the whole process group; only the main process acts on it, and it still needs its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _any_rank(accelerator: Any, flag: bool) -> bool:
    """Whether any process raised its flag: all must stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(int(flag), device=accelerator.device), "sum").item())


def _restore(state: TrainState, folder: Path) -> Progress:
    found = newest_whole(folder / "checkpoints")
    if found is None:
        return Progress()
    module = state.accelerator.unwrap_model(state.module)
    return Progress(**load_checkpoint(found, module=module, optimizer=state.optimizer))


def _save(state: TrainState, folder: Path, progress: Progress) -> None:
    if state.accelerator.is_main_process:
        checkpoints = folder / "checkpoints"
        save_checkpoint(
            checkpoints,
            module=state.accelerator.unwrap_model(state.module),
            optimizer=state.optimizer,
            state=vars(progress),
        )
        prune(checkpoints, keep=2)
    state.accelerator.wait_for_everyone()


def _log(folder: Path, accelerator: Any, stage: str, progress: Progress, rate: float, means: dict[str, float]) -> None:
    memory = torch.cuda.max_memory_allocated() / 2**30 if accelerator.device.type == "cuda" else _resident_gib()
    rows = {name: progress.counted[name] for name in ("truncated", "left_out")}
    values = {name: round(value, 8) for name, value in (means | {"lr": rate, "memory_gib": memory} | rows).items()}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": stage, "step": progress.step, **values}) + "\n")
    accelerator.log({f"{stage}/{name}": value for name, value in values.items()}, step=progress.step)


def _resident_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _drop_later_metrics(path: Path, step: int) -> None:
    """A killed sitting may have logged past its last checkpoint, and its last line may be torn."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            break
    write_text(path, "".join(kept))


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM is remembered (the list is no longer empty); a second one acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])
        say("stopping after this step; once more to stop at once")

    in_main_thread = threading.current_thread() is threading.main_thread()
    for number in (int(signal.SIGINT), int(signal.SIGTERM)) if in_main_thread else ():
        previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
