"""How far several GPUs go: the trainer's own step on one and on N of them, 16 rows each, replicated and in shards.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json       # on 2 H200, some six minutes
    python benchmarks/scaling.py --out benchmarks/results/scaling_alone.json --alone      # on one, two minutes
    python benchmarks/scaling.py --out /tmp/scaling.json --tiny              # anywhere, in a minute: does it run?

SigLIP-so400m-384, Qwen2.5-3B -> 0.5B, random weights, stage dft, rows as in step.py. It starts itself on one device and on
N by torchrun, with models as they are and, but with --tiny, compiled. First a few steps on the same N times 16 rows, which
one device takes as N micro-batches: their losses are compared. Then the time of a step, optimiser and all, on 16 rows each.
With `--alone` one device holds all of what it would share, by the same code: what shards cost beside the wires.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from plan_measured import batch_of, stage_of, whole
from step_contenders import TINY, Size, cast, fit, read_recipe
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from llavakd.config import Recipe
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch
from llavakd.models.alignment import Pair
from llavakd.models.student import VisionLanguageModel, student_config
from llavakd.pipeline import _make_accelerator, _make_fast
from llavakd.train.placement import join, place
from llavakd.train.step import StepResult, StudentModule, TrainState, set_learning_rate, train_step
from losses import environment

COMPARED = 3  # steps whose losses are compared
SHARDINGS = ("none", "student", "both", "zero2", "zero3")
ALONE = SHARDINGS[:3]


class Several:
    """An accelerator that takes itself for one of two, so that `place` makes shards, of one process."""

    num_processes = 2

    def __init__(self, own: Accelerator) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)


def random_model(config: Any, size: Size, device: torch.device, seed: int) -> VisionLanguageModel:
    """A float32 model, the same in all processes."""
    fit(config, size, seed)
    torch.manual_seed(seed)
    return whole(config, torch.float32, str(device))


def rows_of(size: Size, share: int) -> Batch:
    """The rows that the device of this number takes of a step, in the host's memory."""
    torch.manual_seed(100 + share)
    sizes = {"visual": size.visual, "text": size.text, "image": size.image, "vocabulary": size.vocabulary - 1}
    batch = batch_of(size.rows[0], size.response, **sizes, padding=0)
    visual = batch.segments == Segment.VISUAL
    return dataclasses.replace(batch, input_ids=batch.input_ids.masked_fill(visual, size.vocabulary - 1))


def made_ready(
    recipe: Recipe, size: Size, accelerator: Any, teacher: VisionLanguageModel, sharding: str, alone: bool
) -> TrainState:
    """A fresh student and this teacher as the pipeline places them."""
    student, stage = random_model(student_config(recipe.student), size, accelerator.device, 1), stage_of(recipe, "dft")
    tower = teacher.parts()["vision_tower"].state_dict()
    student.parts()["vision_tower"].load_state_dict(tower)
    student.train_only(stage.train)
    pair = Pair(vocab_size=len(student.head), shared_tower=True, note="")
    module = StudentModule(student, stage, pair.vocab_size)
    holder = Several(accelerator) if alone else accelerator
    module, optimizer = place(holder, module, teacher.model, stage, sharding)  # type: ignore[assignment]
    student.model.train()
    given: dict[str, Any] = {"accelerator": accelerator, "module": module, "optimizer": optimizer, "student": student}
    state = TrainState(**given, teacher=teacher, pair=pair, stage=stage)
    _make_fast(recipe, state)
    return state


def measured(state: TrainState, size: Size, shares: list[Batch]) -> dict[str, Any]:
    """Losses of the first steps on all shares, then the time of a step on one share each."""
    accelerator = state.accelerator
    processes, cuda = accelerator.num_processes, accelerator.device.type == "cuda"
    own = shares if processes == 1 else [shares[accelerator.process_index]]
    set_learning_rate(state.optimizer, state.stage.learning_rate)
    losses = [numbers(train_step(state, own, step=step)) for step in range(COMPARED)]
    set_learning_rate(state.optimizer, 0.0)
    train_step(state, own[:1], step=COMPARED)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    accelerator.wait_for_everyone()
    tokens, steps, started = 0, 4 * size.repeats, time.perf_counter()
    for step in range(steps):
        tokens += train_step(state, own[:1], step=step).counted["tokens"]
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"ms": 1e3 * seconds / steps, "tokens_per_s": tokens / seconds, "gib": peak, "losses": losses}


def numbers(result: StepResult) -> dict[str, float]:
    """What a step tells."""
    told = {"loss": result.loss, **result.parts, "grad_norm": result.grad_norm}
    return {name: float(value) for name, value in told.items()}


def work(size: Size, most: int, compiled: bool, alone: bool) -> None:
    """What each process does; the first one prints a line for each way to hold the models."""
    if alone:  # which the trainer, of one process, would not ask for
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        # By the third step of small models one weight that bfloat16 rounds to the other side moves the gradient by 4e-5.
        precision = "fp32" if size.small else "bf16"
        recipe = dataclasses.replace(read_recipe(Path(folder)), trackers=(), compile=compiled, precision=precision)
        accelerator = _make_accelerator(recipe, Path(folder))
        assert recipe.teacher, "the recipe has no teacher"
        teacher = random_model(AutoConfig.from_pretrained(recipe.teacher.path), size, accelerator.device, 2)
        cast(teacher, torch.bfloat16)
        teacher.model.requires_grad_(False).eval()
        shares = [rows_of(size, share) for share in range(most)]
        ways = ALONE if alone else SHARDINGS if accelerator.num_processes > 1 else ALONE[:1]
        for sharding in ways:
            if compiled and sharding == "zero3":  # which is refused
                continue
            state = made_ready(recipe, size, accelerator, teacher, sharding, alone)
            how = {"processes": accelerator.num_processes, "sharding": sharding, "compiled": compiled, "alone": alone}
            how["shards"] = sum(isinstance(weight, DTensor) for weight in state.module.parameters())
            line = how | measured(state, size, shares)
            if accelerator.is_main_process:
                print(json.dumps(line), flush=True)
            join(state.module, state.optimizer, keep=False)
            del state
            accelerator.free_memory()
            gc.collect()
        accelerator.end_training()


def lines_of(processes: int, most: int, *flags: str) -> Iterator[dict[str, Any]]:
    """Start this script on so many devices and read what it prints; why it ended, if it failed."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    by = by if processes > 1 or "--alone" in flags else []
    command = [sys.executable, *by, __file__, "--work", "--processes", str(most), *flags]
    cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}  # or they would not know one another
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | cpu) as process:
        assert process.stdout is not None
        yield from (json.loads(line) for line in process.stdout if line.startswith("{"))
    if process.returncode:
        yield {"processes": processes, "flags": flags, "failed": process.returncode}


def beside(line: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
    """Tokens a second beside so many times one device's, and the largest relative difference of each loss."""
    pairs = [(one, other) for one, other in zip(line["losses"], base["losses"], strict=True)]
    errors = {name: max(abs(one[name] / other[name] - 1) for one, other in pairs) for name in pairs[0][0]}
    return {"scaling": line["tokens_per_s"] / (line["processes"] * base["tokens_per_s"]), "loss_error": errors}


def main(argv: list[str] | None = None) -> None:
    """Parse, and start or be one of the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, to see that everything runs")
    parser.add_argument("--processes", type=int, default=2, help="how many devices beside one")
    parser.add_argument("--alone", action="store_true", help="one device, and shards of one process")
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    size = TINY if options.tiny else Size()
    if options.work:
        work(size, options.processes, options.compiled, options.alone)
        return
    if options.out is None:
        parser.error("--out is missing")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = {"environment": environment(device), "size": dataclasses.asdict(size), "lines": []}
    ways = ([], ["--compiled"])[: 1 if options.tiny else 2]
    most, several = (1, ["--alone"]) if options.alone else (options.processes, [])
    cases = [(how, *who) for how in ways for who in ((1, []), (most, several))]
    for how, processes, together in cases:
        for line in lines_of(processes, most, *how, *["--tiny"] * options.tiny, *together):
            if processes == 1 and not together:
                base = line
            if "losses" in line and "losses" in base:
                line |= beside(line, base)
            found["lines"].append(line)
            print(json.dumps({name: value for name, value in line.items() if name != "losses"}), flush=True)
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
