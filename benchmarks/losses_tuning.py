"""Tile and warps of the loss's kernel, and its chunks: what the constants of ops/rows.py and losses/rows.py are from.

    python benchmarks/losses_tuning.py --out benchmarks/results/losses_tuning.json     # on a GPU

The kernel alone runs at another clock than between the products, so every line is CE + KL as a whole, its contenders in
turns, median over the turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from llavakd.losses import rows
from llavakd.ops import rows as kernels
from losses import PAIRS, draw, environment, floor, measure, ours

VOCABULARY, TURNS = 151936, 3
CHOSEN = (8192, 16)  # tile, warps
SHAPES = [CHOSEN, (2048, 8), (4096, 8), (4096, 16), (8192, 8)]
CHUNKS = [(4, 512), (3, 512), (1, 768), (2, 640), (5, 384)]  # chunks whose gradients share a product, rows of a chunk


def times(images: int) -> list[dict]:
    """One line a setting: milliseconds of CE + KL, the floor's, and GiB beyond the gradients."""
    given = draw(images, PAIRS["qwen2.5 3b to 0.5b"], VOCABULARY, "cuda")

    def step() -> None:
        given["student_hidden"].grad = given["student_head"].grad = None
        ours(given, images, relation=False).backward()

    settings = [(shape, CHUNKS[0]) for shape in SHAPES] + [(CHOSEN, chunks) for chunks in CHUNKS[1:]]
    found: dict = {setting: [] for setting in settings}
    floors = []
    for _ in range(TURNS):
        floors.append(measure(lambda: floor(given), "cuda", 5)[0])
        for shape, (together, count) in settings:
            kernels._BLOCK, kernels._WARPS = shape
            rows.GRADIENT_CHUNKS, rows.CHUNK_BYTES["cuda"] = together, count * VOCABULARY * (8 + 2 * together)
            rows._TILE = 128
            found[shape, (together, count)].append(measure(step, "cuda", 5))
    names = ("tile", "warps", "gradient_chunks", "chunk_rows")
    return [
        {
            "rows": len(given["labels"]),
            **dict(zip(names, (*shape, *chunks), strict=True)),
            "floor": statistics.median(floors),
        }
        | {"ms": statistics.median(ms for ms, _ in lines), "extra_gib": lines[0][1]}
        for (shape, chunks), lines in found.items()
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    told = {"environment": environment("cuda"), "settings": times(16) + times(2)}
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
