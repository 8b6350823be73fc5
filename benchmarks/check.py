"""How fast data are looked at: starting on 665,000 rows, `check --fast` on 100,000, and `check` beside the bare decoder.

    python benchmarks/check.py --out benchmarks/results/check.json     # about five minutes on two cores

Rows are as long as LLaVA-1.5's (about 200 tokens of text); pictures are 640 x 480 JPEG files of noise and gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from llavakd.config import DataConfig, StudentConfig
from llavakd.data.check import check_source
from llavakd.data.pictures import read_image
from llavakd.data.samples import load_samples
from llavakd.models.student import outline_student
from losses import environment

PARTS = Path("src/llavakd/assets/shapes/parts")
WORDS = "there is a red circle in the north and the big blue square below it are white rings small".split()


def write_rows(path: Path, rows: int, pictures: int) -> None:
    """A LLaVA list: one to six rounds about one of the pictures."""
    rng = np.random.default_rng(0)
    rounds = rng.integers(1, 7, rows).tolist()
    with path.open("w", encoding="utf-8") as file:
        for index in range(rows):
            turns = []
            for number in range(rounds[index]):
                question, answer = (" ".join(rng.choice(WORDS, size)) for size in (12, int(rng.choice((2, 40, 90)))))
                turns += [
                    {"from": "human", "value": "<image>\n" * (not number) + question},
                    {"from": "gpt", "value": answer},
                ]
            row = {"id": str(index), "image": f"coco/{index % pictures:06d}.jpg", "conversations": turns}
            file.write((",\n" if index else "[\n") + json.dumps(row))
        file.write("\n]\n")


def write_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 200, 640)[None, :, None] * np.ones((480, 1, 3))
    for index in range(count):
        pixels = ramp + rng.normal(0, 20, (480, 640, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index:06d}.jpg", quality=90)


def decode(given: tuple[DataConfig, list[str]]) -> int:
    """Bare decoding, what a check cannot do without."""
    return sum(read_image(given[0], name).width > 0 for name in given[1])


def main() -> None:
    """Write, look, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    student = outline_student(
        StudentConfig(vision_tower=str(PARTS / "tower"), language_model=str(PARTS / "student-lm"),
                      vision_feature_select_strategy="full")
    )  # fmt: skip
    found: dict = {"environment": environment("cpu"), "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_pictures(place / "coco", 2000)
        sizes = {"start": 665_000, "fast": 100_000, "decode": 8_000}
        data = {name: DataConfig(path=str(place / f"{name}.json"), images=folder, max_length=4096) for name in sizes}
        for name, rows in sizes.items():
            write_rows(place / f"{name}.json", rows, 2000)
        before = time.perf_counter()
        samples = load_samples(data["start"], find_pictures=True)
        found["start"] = {"rows": len(samples), "seconds": time.perf_counter() - before}
        found["start"]["resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        for name, fast in (("fast", True), ("decode", False)):
            before = time.perf_counter()
            told = check_source(data[name], [(student.renderer(data[name]), student.image_processor)], fast=fast)
            seconds = time.perf_counter() - before
            assert told["unusable"] == 0
            text = told["tokens"]["prompt"]["mean"] + told["tokens"]["response"]["mean"]
            found[name] = {"rows": told["rows"], "text_tokens": text, "rows_per_s": told["rows"] / seconds}
        names = [name for sample in load_samples(data["decode"]) for name in sample.images]
        before = time.perf_counter()
        with ProcessPoolExecutor() as pool:
            assert sum(pool.map(decode, [(data["decode"], names[i : i + 250]) for i in range(0, len(names), 250)]))
        found["decode"]["bare_decoder_rows_per_s"] = len(names) / (time.perf_counter() - before)
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
