"""Block, warps and chunk of the loss's kernel: what `_BLOCK`, `_WARPS` and `CHUNK_BYTES` were chosen from.

    python benchmarks/losses_tuning.py --out benchmarks/results/losses_tuning.json     # on a GPU

The logits of a row are 608 kB, so no block holds one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from llavakd.losses import rows
from llavakd.ops import rows as kernels
from losses import PAIRS, draw, environment, floor, measure, ours

VOCABULARY, ROWS = 151936, 768
SHAPES = [(8192, 16), (4096, 8), (4096, 16), (8192, 8), (8192, 32), (16384, 16), (16384, 32), (2048, 8), (2048, 4)]
SHAPES += [(32768, 32)]
CHUNKS = (0.25, 0.375, 0.5, 0.75, 0.9, 1.0)


def kernel_times() -> list[dict]:
    """Milliseconds of the kernel alone over 768 rows by block and warps."""
    logits, taught = (torch.randn(ROWS, VOCABULARY, device="cuda") for _ in range(2))
    labels = torch.randint(VOCABULARY, (ROWS,), device="cuda")
    weight = torch.ones(ROWS, device="cuda")
    how = rows.Scoring("forward_kl", 0.5, 1.0, (rows.LogitForm(), rows.LogitForm()), torch.bfloat16)
    found = []
    for block, warps in SHAPES:
        kernels._BLOCK, kernels._WARPS = block, warps
        used = logits.clone()
        ms, _ = measure(lambda used=used: kernels.score_triton(used, taught, labels, weight, weight, how), "cuda", 10)
        found.append({"block": block, "warps": warps, "ms": ms})
    return found


def chunk_times() -> list[dict]:
    """The whole loss with the relation by GiB of logits at once: milliseconds, the floor's, and GiB at the peak."""
    found = []
    for images in (16, 2):
        given = draw(images, next(iter(PAIRS.values())), VOCABULARY, "cuda")
        least, _ = measure(lambda given=given: floor(given), "cuda", 5)
        for chunk in CHUNKS:
            rows.CHUNK_BYTES["cuda"] = int(chunk * 2**30)

            def step(given: dict = given, images: int = images) -> None:
                given["student_hidden"].grad = given["student_head"].grad = None
                ours(given, images).backward()

            ms, peak = measure(step, "cuda", 5)
            found.append({"images": images, "chunk": chunk, "ms": ms, "floor": least, "peak": peak})
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    told = {"environment": environment("cuda"), "kernel": kernel_times()}
    best = min(told["kernel"], key=lambda line: line["ms"])
    kernels._BLOCK, kernels._WARPS = best["block"], best["warps"]
    options.out.write_text(json.dumps(told | {"chunk": chunk_times()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
