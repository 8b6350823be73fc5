"""How long the trainer waits for data, where a row's time goes, and how much of a padded batch is padding.

    python benchmarks/pipeline.py --out benchmarks/results/pipeline.json      # about four minutes; needs free cores
    python benchmarks/pipeline.py --out /tmp/pipeline.json --tiny             # in seconds: does it run?

Rows are drawn as real mixtures are: log-normal answers of 150 words on average, each word a token, and 6 % without a
picture; pictures are 640 x 480 JPEG files, read again and again, so that no disk is measured. The trainer's own loader
feeds a step that only sleeps, as the main process of a GPU mostly does.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from check import PARTS, WORDS, write_pictures
from plan_llava_kd import RECIPES, write_configs
from transformers import SiglipImageProcessorPil

from llavakd.config import DataConfig, Recipe, StudentConfig, load_recipe
from llavakd.data.collate import Batch, Row, RowDataset, Source, collate
from llavakd.data.pictures import read_image
from llavakd.data.sampler import plan_epoch
from llavakd.data.samples import load_samples
from llavakd.models.student import VisionLanguageModel, outline_student
from llavakd.train.loop import _read
from losses import environment

MEAN_ANSWER, TEXT_ONLY = 150, 0.06  # words; share of rows
QUESTION = 12  # words


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The data, and the trainer's settings for them."""

    recipe: Recipe
    student: VisionLanguageModel
    dataset: RowDataset
    micro: int
    global_batch: int
    device: str

    def epoch(self, grouping: str, epoch: int) -> Iterator[list[int]]:
        """Row numbers of one process's micro-batches."""
        order: dict[str, Any] = {"global_batch_size": self.global_batch, "grouping": grouping, "seed": 0}
        for batch in plan_epoch(self.dataset.lengths, **order, epoch=epoch):
            yield from batch.reshape(-1, self.micro).tolist()

    def endless(self) -> Iterator[list[int]]:
        """Epoch after epoch, grouped as the recipe does by default."""
        return itertools.chain.from_iterable(self.epoch("modality_length", number) for number in itertools.count())

    @contextmanager
    def batches(self, workers: int) -> Iterator[Iterator[Batch]]:
        """What the trainer itself reads of them, without an end."""
        recipe, device = dataclasses.replace(self.recipe, workers=workers), torch.device(self.device)
        accelerator = SimpleNamespace(device=device, process_index=0, num_processes=1)
        order = {"global_batch_size": self.global_batch, "grouping": "modality_length", "max_tokens_per_batch": None}
        state: Any = SimpleNamespace(student=self.student, stage=SimpleNamespace(**order), accelerator=accelerator)
        with _read(state, self.dataset, recipe, start=0, steps=sys.maxsize, micro_batch_size=self.micro) as read:
            yield itertools.chain.from_iterable(read)


def write_rows(path: Path, rows: int, pictures: int, log_std: float) -> None:
    """A LLaVA list with one question and answer a row."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(math.log(MEAN_ANSWER) - log_std**2 / 2, log_std, rows).round().clip(1).astype(int)
    textual, told = rng.random(rows) < TEXT_ONLY, []
    for index in range(rows):
        question, answer = (" ".join(rng.choice(WORDS, size)) for size in (QUESTION, lengths[index]))
        row: dict[str, Any] = {"id": str(index)}
        if not textual[index]:
            row["image"], question = f"coco/{index % pictures:06d}.jpg", "<image>\n" + question
        row["conversations"] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        told.append(row)
    path.write_text(json.dumps(told), encoding="utf-8")


def make_setup(folder: Path, options: argparse.Namespace, device: str) -> Setup:
    """Rows, pictures, and a student of true size without weights; its tokenizer is the small world's."""
    configs = folder / "configs"
    configs.mkdir()
    write_configs(configs)
    SiglipImageProcessorPil(size={"height": 384, "width": 384}).save_pretrained(configs / "tower")
    parts: dict[str, Any] = {"vision_tower": str(configs / "tower"), "language_model": str(PARTS / "student-lm")}
    student = outline_student(StudentConfig(**parts, vision_feature_select_strategy="full"))
    write_pictures(folder / "coco", options.pictures)
    write_rows(folder / "rows.json", options.rows, options.pictures, options.log_std)
    data = DataConfig(path=str(folder / "rows.json"), images=str(folder))
    source = Source(samples=load_samples(data, find_pictures=True), renderer=student.renderer(data), data=data)
    return Setup(
        recipe=load_recipe(RECIPES / "qwen2.5-0.5b.yaml"),
        student=student,
        dataset=RowDataset([source], image_processor=student.image_processor),
        micro=options.micro,
        global_batch=options.global_batch,
        device=device,
    )


def padding(setup: Setup) -> list[dict[str, Any]]:
    """Of one epoch by grouping: tokens that live, tokens in padded micro-batches, and the share that is padding."""
    source = setup.dataset.sources[0]
    rendered = source.renderer.render_each(list(source.samples))
    live = np.array([len(row.ids) for row in rendered])
    lines = []
    for grouping in ("none", "length", "modality_length"):
        rows = [live[indices] for indices in setup.epoch(grouping, 0)]
        padded, alive = (sum(sizes) for sizes in ([len(row) * row.max() for row in rows], [row.sum() for row in rows]))
        largest = max(len(row) * row.max() for row in rows)
        line = {"grouping": grouping, "live_tokens": int(alive), "padded_tokens": int(padded)}
        line |= {"padding": float(1 - alive / padded), "padded_to_live": float(padded / alive)}
        lines.append(line | {"mean_row": float(live.mean()), "longest_row": int(live.max()), "largest": int(largest)})
    return lines


def parts_of_a_row(setup: Setup, batches: int) -> dict[str, float]:
    """Milliseconds a row in one process by part, and through the data set and `collate` as a worker does it."""
    source, pad = setup.dataset.sources[0], setup.student.tokenizer.pad_token_id
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: str, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*given, **options)
        seconds[name] += time.perf_counter() - start
        return result

    for indices in itertools.islice(setup.endless(), batches):
        samples = timed("row of the file", lambda: [source.samples[index] for index in indices])  # noqa: B023
        texts = timed("render", source.renderer.render_each, samples)
        rows = []
        for sample, text in zip(samples, texts, strict=True):
            pictures = [timed("read and decode", read_image, source.data, name) for name in sample.images]
            made = [
                timed("processor", setup.student.image_processor, images=[one], return_tensors="pt") for one in pictures
            ]
            pixels = {"pixel_values": torch.cat([one.pixel_values for one in made])} if made else {}
            rows.append(Row(id=sample.id, text=text, pictures=pixels))
        timed("collate", collate, rows, pad_token_id=pad)
        loaded = timed("all, by the data set", setup.dataset.__getitems__, indices)
        timed("all, by the data set", collate, loaded, pad_token_id=pad)
    return {name: 1e3 * spent / (batches * setup.micro) for name, spent in seconds.items()}


def waiting(setup: Setup, workers: int, step_ms: float, seconds: float) -> dict[str, Any]:
    """Rows a second with a step that sleeps `step_ms`, and the share of the time that is spent waiting for a batch."""
    start = time.perf_counter()
    with setup.batches(workers) as batches:
        next(batches)
        first = time.perf_counter() - start
        for _ in range(2 * workers):  # what the workers had begun before anyone asked
            next(batches)
            time.sleep(step_ms / 1e3)
        start, steps, waited = time.perf_counter(), 0, 0.0
        while time.perf_counter() - start < seconds:
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            time.sleep(step_ms / 1e3)
            steps += 1
        spent = time.perf_counter() - start
    line = {"workers": workers, "step_ms": step_ms, "steps": steps, "first_batch_s": first}
    return line | {"rows_per_s": steps * setup.micro / spent, "waiting": waited / spent if step_ms else None}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; `--tiny` stands for small numbers that are not given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a few rows, to see that everything runs")
    whole: dict[str, Any] = {
        "rows": 8000,
        "pictures": 400,
        "micro": 16,
        "global_batch": 128,
        "seconds": 8.0,
        "log_std": 0.8,
    }
    whole |= {"workers": [0, 1, 2, 4, 8, 16], "step_ms": [0.0, 270.0], "batches": 16}
    tiny: dict[str, Any] = {"rows": 24, "pictures": 3, "micro": 2, "global_batch": 4, "seconds": 0.2, "log_std": 0.8}
    tiny |= {"workers": [0, 1], "step_ms": [0.0, 20.0], "batches": 2}
    told = {
        "rows": "in the data file",
        "pictures": "files that they share",
        "micro": "rows of a batch",
        "global_batch": "rows of an optimiser step",
        "log_std": "standard deviation of the logarithm of an answer's words",
        "seconds": "of each measurement with the loader",
        "workers": "of the loader",
        "step_ms": "length of a step; 0 asks as fast as the loader gives",
        "batches": "that are timed by part",
    }
    for name, text in told.items():
        kind = whole[name][0] if isinstance(whole[name], list) else whole[name]
        several: dict[str, Any] = {"nargs": "+"} if isinstance(whole[name], list) else {}
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(kind), help=f"{text}; {whole[name]}", **several)
    options = parser.parse_args(argv)
    for name, value in (tiny if options.tiny else whole).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(argv: list[str] | None = None) -> None:
    """Draw, measure, write JSON after every line."""
    options = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {name: value for name, value in vars(options).items() if name != "out"}
    found: dict[str, Any] = {"environment": environment(device) | {"cores": os.cpu_count()}, "options": given}
    found |= {"answers": {"mean": MEAN_ANSWER, "text_only": TEXT_ONLY}}

    def note(section: str, lines: list[dict[str, Any]]) -> None:
        found.setdefault(section, []).extend(lines)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        for line in lines:
            print(json.dumps({"section": section, **line}), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(Path(folder), options, device)
        note("padding", padding(setup))
        note("row_ms", [parts_of_a_row(setup, options.batches)])
        for step_ms, workers in itertools.product(options.step_ms, options.workers):
            note("loader", [waiting(setup, workers, step_ms, options.seconds)])


if __name__ == "__main__":
    main()
