"""Scenes as 48x48 pictures."""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llavakd.shapes.scenes import SIDE, WORLD, Scene

CELL, JITTER, NOISE = WORLD["cell"], WORLD["jitter"], WORLD["noise"]
GROUND, RGB, DIAMETER = WORLD["ground"], WORLD["colors"], WORLD["sizes"]
# Which pixels belong to a shape, from their places right of and below its centre in half diameters.
OUTLINES: dict[str, Callable[..., NDArray[np.bool_]]] = {
    "circle": lambda x, y: x**2 + y**2 <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: 2 * abs(x) <= y + 1,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 1 / 3,
    "ring": lambda x, y: abs(x**2 + y**2 - 0.675) <= 0.325,
}


@cache
def mask(shape: str, size: str) -> NDArray[np.bool_]:
    """The pixels of a shape, [d, d] with the diameter d of the size; shared, so not to be written to."""
    places = (2 * np.arange(DIAMETER[size]) + 1) / DIAMETER[size] - 1
    pixels = OUTLINES[shape](places[None, :], places[:, None])
    pixels.flags.writeable = False
    return pixels


def draw(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw a scene as 48x48 RGB pixels; `rng` decides the jitter of each thing and the noise of each pixel."""
    canvas = np.full((SIDE * CELL, SIDE * CELL, 3), GROUND, dtype=np.float32)
    jitter = rng.integers(-JITTER, JITTER + 1, (len(scene.things), 2)).tolist()
    for thing, (down, along) in zip(scene.things, jitter, strict=True):
        pixels = mask(thing.shape, thing.size)
        margin, (row, column) = (CELL - len(pixels)) // 2, divmod(thing.cell, SIDE)
        top, left = row * CELL + margin + down, column * CELL + margin + along
        canvas[top : top + len(pixels), left : left + len(pixels)][pixels] = RGB[thing.color]
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * (255 * NOISE)
    return Image.fromarray(canvas.round().clip(0, 255).astype(np.uint8))
