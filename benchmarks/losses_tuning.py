"""Tile and warps of the loss's kernel, and its chunks: what the constants of ops/rows.py and losses/rows.py are from.

    python benchmarks/losses_tuning.py --out benchmarks/results/losses_tuning.json     # on a GPU
    git show 972859f:src/llavakd/ops/rows.py > /tmp/waiting.py                         # a kernel of the history beside it:
    python benchmarks/losses_tuning.py --kernels /tmp/waiting.py --out ...

The kernel alone runs at another clock than between the products, so every line is CE + KL as a whole, its contenders in
turns, median over the turns.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from llavakd.losses import rows
from llavakd.ops import rows as kernels
from losses import PAIRS, draw, environment, floor, liger_chunked, measure, ours

VOCABULARY, TURNS, IMAGES = 151936, 2, 16
SHAPES = [(2048, 8), (2048, 16), (4096, 16), (4096, 32), (8192, 32), (8192, 16)]  # tile, warps
# Chunks whose gradients share a product, rows of a chunk; the first for all shapes, the others for the first shape.
CHUNKS = [(3, 512), (2, 768), (4, 384), (3, 640), (5, 384), (4, 512)]
SCORE = kernels.score_triton


def load_kernel(path: Path) -> ModuleType:
    """A module of another form of ops/rows.py."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(path.stem)


def settings(others: list[Path]) -> list[dict[str, Any]]:
    """The tree's kernel with other shapes and chunks, and others as they are."""
    own = {"kernel": "the tree's", "module": kernels, "score": SCORE}
    found = [own | {"shape": shape, "chunks": CHUNKS[0]} for shape in SHAPES]
    found += [own | {"shape": SHAPES[0], "chunks": chunks} for chunks in CHUNKS[1:]]
    for path in others:
        module = load_kernel(path)
        form = {"kernel": path.stem, "module": module, "score": module.score_triton}
        found.append(form | {"shape": (module._BLOCK, module._WARPS), "chunks": CHUNKS[0]})
    return found


def times(others: list[Path]) -> dict[str, Any]:
    """Milliseconds of CE + KL by setting, GiB beyond the gradients, and the floor's and Liger's milliseconds."""
    given = draw(IMAGES, PAIRS["qwen2.5 3b to 0.5b"], VOCABULARY, "cuda")

    def step(loss: Any) -> None:
        given["student_hidden"].grad = given["student_head"].grad = None
        loss().backward()

    tried = settings(others)
    lines: list[list[tuple[float, float]]] = [[] for _ in tried]
    floors, peers = [], []
    for _ in range(TURNS):
        floors.append(measure(lambda: floor(given), "cuda", 5)[0])
        peers.append(measure(lambda: step(lambda: liger_chunked(given, IMAGES)), "cuda", 5)[0])
        for setting, line in zip(tried, lines, strict=True):
            together, count = setting["chunks"]
            kernels.score_triton = setting["score"]
            setting["module"]._BLOCK, setting["module"]._WARPS = setting["shape"]
            rows.GRADIENT_CHUNKS, rows.CHUNK_BYTES["cuda"] = together, count * VOCABULARY * (8 + 2 * together)
            rows._TILE = 128
            line.append(measure(lambda: step(lambda: ours(given, IMAGES, relation=False)), "cuda", 4))
    names = ("tile", "warps", "gradient_chunks", "chunk_rows")
    told = [
        {"rows": len(given["labels"]), "kernel": setting["kernel"]}
        | dict(zip(names, (*setting["shape"], *setting["chunks"]), strict=True))
        | {"floor": min(floors), "ms": statistics.median(ms for ms, _ in line), "extra_gib": line[0][1]}
        for setting, line in zip(tried, lines, strict=True)
    ]
    return {"liger_chunked_ms": peers, "settings": told}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kernels", type=Path, nargs="*", default=[], help="files of other forms of ops/rows.py")
    options = parser.parse_args()
    told = {"environment": environment("cuda")} | times(options.kernels)
    options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
