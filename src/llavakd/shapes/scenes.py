"""What a picture shows: up to five things on a 3x3 grid, the sentence that says so, and its pixels."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

WORLD: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
SHAPES, COLORS, SIZES, PLACES = (tuple(WORLD[key]) for key in ("shapes", "colors", "sizes", "places"))
SPLITS = tuple(dict.fromkeys(WORLD["buckets"]))
SIDE = 3  # Cells along one side of the grid.
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


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn thing, of SHAPES, COLORS and SIZES, in cell 0 to 8."""

    shape: str
    color: str
    size: str
    cell: int

    def __post_init__(self) -> None:
        for value, allowed in zip(vars(self).values(), (SHAPES, COLORS, SIZES, range(SIDE * SIDE)), strict=True):
            assert value in allowed, f"got {value!r} in a Thing, expected one of {list(allowed)}"

    @property
    def name(self) -> str:
        """The colour and the shape, as questions and answers say it: `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The two to five things of one picture, in reading order, at most one a cell."""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        assert 2 <= len(cells) <= 5, f"got {len(cells)} things, expected 2 to 5"
        assert cells == sorted(set(cells)), f"got things in cells {cells}, expected different ones in rising order"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """All of the scene: `northwest big red circle, center small blue square.`; `rng` shuffles what is else its key."""
    things = scene.things if rng is None else [scene.things[place] for place in rng.permutation(len(scene.things))]
    return ", ".join(f"{PLACES[thing.cell]} {thing.size} {thing.name}" for thing in things) + "."


def split_of(scene: Scene) -> str:
    """The one split of SPLITS in which a scene may appear, by a stable hash of its caption, whatever the world's seed."""
    digest = hashlib.blake2b(caption(scene).encode(), digest_size=8).digest()
    return WORLD["buckets"][int.from_bytes(digest, "big") % len(WORLD["buckets"])]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of 2 to 5 things, of 2 to 4 colours so that equal colours are common enough to be counted."""
    count = int(rng.integers(2, 6))
    cells = sorted(rng.permutation(SIDE * SIDE)[:count].tolist())
    palette = rng.permutation(COLORS)[: rng.integers(2, 5)]
    drawn = (rng.choice(options, count).tolist() for options in (palette, SHAPES, SIZES))
    rows = zip(cells, *drawn, strict=True)
    return Scene(things=tuple(Thing(shape=s, color=c, size=z, cell=cell) for cell, c, s, z in rows))


def scene_in(split: str, rng: np.random.Generator) -> Scene:
    """Draw scenes until one belongs to a split of SPLITS."""
    assert split in SPLITS, f"got split {split!r}, expected one of {list(SPLITS)}"
    while split_of(scene := random_scene(rng)) != split:
        pass
    return scene


def mask(shape: str, size: str) -> NDArray[np.bool_]:
    """The pixels of a shape, [d, d] with the diameter d of the size."""
    places = (2 * np.arange(DIAMETER[size]) + 1) / DIAMETER[size] - 1
    return OUTLINES[shape](places[None, :], places[:, None])


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
