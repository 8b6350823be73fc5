"""What a picture shows: up to five things on a 3x3 grid, and the sentence that says so."""

import hashlib
from dataclasses import dataclass

import numpy as np

SIDE = 3
"""Cells along one side of the grid."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLORS = ("red", "green", "blue", "yellow", "white", "black")
SIZES = ("small", "big")
PLACES = ("northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast")
"""Names of the nine cells in reading order; a thing's ``cell`` is an index into this."""

DIRECTIONS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
"""Steps of (row, column) by the words that name them."""

SPLITS = ("train", "text", "val", "test")
# Most of the space goes to the pictures that are trained on; a fifth is plenty for each of the others.
_SPLIT_OF_BUCKET = ("train", "train", "text", "val", "test")


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One drawn thing.

    Attributes:
        shape: One of :data:`SHAPES`.
        color: One of :data:`COLORS`.
        size: One of :data:`SIZES`.
        cell: Its cell, 0 to 8 in reading order.

    Raises:
        ValueError: If an attribute is none of the above.
    """

    shape: str
    color: str
    size: str
    cell: int

    def __post_init__(self) -> None:
        fields = ((self.shape, SHAPES), (self.color, COLORS), (self.size, SIZES), (self.cell, range(SIDE * SIDE)))
        for value, allowed in fields:
            if value not in allowed:
                raise ValueError(f"got {value!r} in a Thing, expected one of {list(allowed)}; use one of those")

    @property
    def name(self) -> str:
        """The colour and the shape, as questions and answers say it: ``red circle``."""
        return f"{self.color} {self.shape}"

    @property
    def row(self) -> int:
        """The row of its cell, 0 at the top."""
        return self.cell // SIDE

    @property
    def column(self) -> int:
        """The column of its cell, 0 at the left."""
        return self.cell % SIDE


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The things of one picture.

    Attributes:
        things: Two to five things in reading order, at most one a cell.

    Raises:
        ValueError: If there are too few or too many, or their cells do not strictly increase.
    """

    things: tuple[Thing, ...]

    def __post_init__(self) -> None:
        cells = [thing.cell for thing in self.things]
        if not 2 <= len(cells) <= 5 or cells != sorted(set(cells)):
            raise ValueError(f"got things in cells {cells}, expected 2 to 5 cells in rising order; sort and part them")

    def at(self, cell: int) -> Thing | None:
        """The thing in a cell (0 to 8), or None where the cell is empty."""
        return next((thing for thing in self.things if thing.cell == cell), None)

    def outward(self, thing: Thing, direction: str) -> list[Thing | None]:
        """What lies in one direction of a thing, from the next cell to the edge of the grid.

        Args:
            thing: Where to start.
            direction: A key of :data:`DIRECTIONS`.

        Returns:
            One entry a cell, None for an empty one; empty where the thing stands at that edge.
        """
        down, along = DIRECTIONS[direction]
        row, column = thing.row + down, thing.column + along
        found = []
        while 0 <= row < SIDE and 0 <= column < SIDE:
            found.append(self.at(row * SIDE + column))
            row, column = row + down, column + along
        return found


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """The scene in words: ``northwest big red circle, center small blue square.``.

    The caption names all that is in the scene and nothing else. In reading order it is also the scene's canonical key.

    Args:
        scene: What to say.
        rng: Shuffles the things, so that whoever says them must look each place up; None keeps reading order.
    """
    order = range(len(scene.things)) if rng is None else rng.permutation(len(scene.things)).tolist()
    things = [scene.things[place] for place in order]
    return ", ".join(f"{PLACES[thing.cell]} {thing.size} {thing.name}" for thing in things) + "."


def split_of(scene: Scene) -> str:
    """The one split of :data:`SPLITS` in which a scene may appear, whatever the seed of the world.

    A stable hash of the caption decides, so splits are disjoint without any process knowing what another drew.
    """
    digest = hashlib.blake2b(caption(scene).encode(), digest_size=8).digest()
    return _SPLIT_OF_BUCKET[int.from_bytes(digest, "big") % len(_SPLIT_OF_BUCKET)]


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene of 2 to 5 things.

    Colours come from a palette of 2 to 4 for each scene, so that equal colours are common enough to be counted.
    """
    count = int(rng.integers(2, 6))
    cells = sorted(rng.permutation(SIDE * SIDE)[:count].tolist())
    palette = rng.permutation(len(COLORS))[: rng.integers(2, 5)].tolist()
    colors = rng.integers(0, len(palette), count).tolist()
    shapes = rng.integers(0, len(SHAPES), count).tolist()
    sizes = rng.integers(0, len(SIZES), count).tolist()
    things = tuple(
        Thing(shape=SHAPES[shape], color=COLORS[palette[color]], size=SIZES[size], cell=cell)
        for shape, color, size, cell in zip(shapes, colors, sizes, cells, strict=True)
    )
    return Scene(things=things)


def scene_in(split: str, rng: np.random.Generator) -> Scene:
    """Draw scenes until one belongs to a split.

    Args:
        split: One of :data:`SPLITS`.
        rng: Moves on by as many scenes as it takes.

    Raises:
        ValueError: If the split does not exist.
    """
    if split not in SPLITS:
        raise ValueError(f"got split {split!r}, expected one of {list(SPLITS)}; use one of those")
    while True:
        scene = random_scene(rng)
        if split_of(scene) == split:
            return scene
