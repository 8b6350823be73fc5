"""What a picture shows: up to five things on a 3x3 grid, and the sentence that says so."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llavakd.errors import UserError

WORLD: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("world.yaml").read_text(encoding="utf-8"))
SHAPES, COLORS, SIZES, PLACES = (tuple(WORLD[key]) for key in ("shapes", "colors", "sizes", "places"))
SIDE = 3  # Cells along one side of the grid.
SPLITS = ("train", "text", "val", "test")
# Most of the space goes to the pictures that are trained on; a fifth is plenty for each of the others.
_SPLIT_OF_BUCKET = ("train", *SPLITS)


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn thing, of SHAPES, COLORS and SIZES, in cell 0 to 8; UserError if an attribute is none of these."""

    shape: str
    color: str
    size: str
    cell: int

    def __post_init__(self) -> None:
        for value, allowed in zip(vars(self).values(), (SHAPES, COLORS, SIZES, range(SIDE * SIDE)), strict=True):
            if value not in allowed:
                raise UserError(f"got {value!r} in a Thing, expected one of {list(allowed)}; use one of those")

    @property
    def name(self) -> str:
        """The colour and the shape, as questions and answers say it: `red circle`."""
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The two to five things of one picture, in reading order, at most one a cell; UserError if they are not."""

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        if not 2 <= len(cells) <= 5 or cells != sorted(set(cells)):
            raise UserError(f"got things in cells {cells}, expected 2 to 5 cells in rising order; sort and part them")


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """All of the scene and nothing else, in words: `northwest big red circle, center small blue square.`.

    In reading order (no `rng`) it is the scene's key; `rng` shuffles the things, so that each place is looked up.
    """
    things = scene.things if rng is None else [scene.things[place] for place in rng.permutation(len(scene.things))]
    return ", ".join(f"{PLACES[thing.cell]} {thing.size} {thing.name}" for thing in things) + "."


def split_of(scene: Scene) -> str:
    """The one split of SPLITS in which a scene may appear, by a stable hash of its caption, whatever the world's seed."""
    digest = hashlib.blake2b(caption(scene).encode(), digest_size=8).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest, "big") % len(_SPLIT_OF_BUCKET)]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of 2 to 5 things, of 2 to 4 colours so that equal colours are common enough to be counted."""
    count = int(rng.integers(2, 6))
    cells = sorted(rng.permutation(SIDE * SIDE)[:count].tolist())
    palette = rng.permutation(COLORS)[: rng.integers(2, 5)]
    drawn = (rng.choice(options, count).tolist() for options in (palette, SHAPES, SIZES))
    rows = zip(cells, *drawn, strict=True)
    return Scene(things=tuple(Thing(shape=s, color=c, size=z, cell=cell) for cell, c, s, z in rows))


def scene_in(split: str, rng: np.random.Generator) -> Scene:
    """Draw scenes until one belongs to a split of SPLITS; UserError if there is no such split."""
    if split not in SPLITS:
        raise UserError(f"got split {split!r}, expected one of {list(SPLITS)}; use one of those")
    while split_of(scene := random_scene(rng)) != split:
        pass
    return scene
