"""Tokens a second of the trainer's step on rows of uneven lengths: padded micro-batches beside packs of the same rows.

    python benchmarks/step_packing.py --out benchmarks/results/step_packing.json    # on one H200, about two minutes
    python benchmarks/step_packing.py --out /tmp/packing.json --tiny                # anywhere, in seconds

Models as in step.py; answers are log-normal with 150 tokens on average, and 6 % of the rows have no picture. A step is 64
rows: four micro-batches of 16 in the order that the rows come in, the same sorted by length as the trainer does within a
step, or packs of at most as many tokens as 16 whole rows have. Tokens of padding do not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipeline import MEAN_ANSWER, TEXT_ONLY
from plan_measured import BEFORE, prepared, stage_of
from step_contenders import TINY, Size, make_models, read_recipe
from torch import Tensor

from llavakd.config import Recipe
from llavakd.data.chat import Rendered, Segment
from llavakd.data.collate import Batch, Row, collate, collate_step
from llavakd.models.fast import attend_by_rows, compile_layers, trim_tower
from llavakd.train.step import TrainState, set_learning_rate, train_step
from losses import environment

STEP_ROWS, MICRO, STEPS, LOG_STD = 64, 16, 4, 1.0


def draw_rows(size: Size, count: int, mean_answer: float) -> list[Row]:
    """Rows as they come from a mixture; all pictures are one."""
    rng = np.random.default_rng(0)
    answers = rng.lognormal(math.log(mean_answer) - LOG_STD**2 / 2, LOG_STD, count).round().clip(1, 1000).astype(int)
    picture = torch.randn(1, 3, size.image, size.image)
    return [
        make_row(str(number), int(answer), None if rng.random() < TEXT_ONLY else picture, size, rng)
        for number, answer in enumerate(answers)
    ]


def make_row(name: str, answer: int, picture: Tensor | None, size: Size, rng: np.random.Generator) -> Row:
    """BEFORE tokens, a picture's or none, BEFORE more, and the answer."""
    visual = size.visual if picture is not None else 0
    segments = [Segment.PROMPT] * BEFORE + [Segment.VISUAL] * visual + [Segment.PROMPT] * BEFORE
    segments += [Segment.RESPONSE] * answer
    ids = rng.integers(10, size.vocabulary - 1, len(segments)).tolist()
    pictures = {} if picture is None else {"pixel_values": picture}
    return Row(id=name, text=Rendered(ids=ids, segments=segments), pictures=pictures)


def laid_out(rows: Sequence[Row], kind: str, tokens: int) -> list[Batch]:
    """The micro-batches of one step."""
    if kind == "packed":
        return collate_step(rows, pad_token_id=0, max_tokens=tokens)
    if kind == "padded, sorted":
        rows = sorted(rows, key=lambda row: -len(row.text.ids))
    return [collate(rows[start : start + MICRO], pad_token_id=0) for start in range(0, len(rows), MICRO)]


def measure_kind(state: TrainState, rows: Sequence[Row], kind: str, tokens: int, device: str) -> dict[str, Any]:
    """One pass to compile and warm up, one that counts."""
    cuda, losses = device == "cuda", []
    steps = [laid_out(rows[start : start + STEP_ROWS], kind, tokens) for start in range(0, len(rows), STEP_ROWS)]
    steps = [[batch.pin_memory() if cuda else batch for batch in step] for step in steps]
    live = sum(len(row.text.ids) for row in rows)
    laid = sum(batch.input_ids.numel() for step in steps for batch in step)
    for _ in range(2):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        losses = [train_step(state, step, step=number).loss for number, step in enumerate(steps)]
        loss = float(torch.stack(losses).mean())
        seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    line = {"kind": kind, "seconds": seconds, "live_tokens_per_s": live / seconds, "padding": 1 - live / laid}
    return line | {"micro_batches": sum(map(len, steps)), "peak_gib": peak, "loss": loss}


def run(recipe: Recipe, size: Size, device: str, out: Path) -> None:
    """All three, losses beside one another."""
    models = make_models(recipe, size, device)
    stage = dataclasses.replace(stage_of(recipe, "dft"), max_tokens_per_batch=None)
    mean = MEAN_ANSWER if not size.small else 8
    rows, tokens = draw_rows(size, STEPS * STEP_ROWS, mean), MICRO * (size.visual + 2 * BEFORE + mean)
    found: dict[str, Any] = {"environment": environment(device), "rows": len(rows), "max_tokens": tokens, "kinds": []}
    both = models.student.model, models.teacher.model
    for model in both:
        trim_tower(model)
        if device == "cuda":
            attend_by_rows(model)
    compile_layers(*both, backend=size.backend)
    state = prepared(stage, models.student, models.teacher, vocab_size=len(models.student.head))
    set_learning_rate(state.optimizer, 0.0)  # all see the same weights
    for kind in ("padded, as they come", "padded, sorted", "packed"):
        line = measure_kind(state, rows, kind, tokens, device)
        first = found["kinds"][0] if found["kinds"] else line
        line["to_padded"] = line["live_tokens_per_s"] / first["live_tokens_per_s"]
        found["kinds"].append(line)
        print(json.dumps(line), flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="models of a few layers, to see that everything runs")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        run(read_recipe(Path(folder)), TINY if options.tiny else Size(), device, options.out)


if __name__ == "__main__":
    main()
