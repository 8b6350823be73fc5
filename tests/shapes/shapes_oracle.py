"""The true answer of a question by its words, sharing no code with the package but the scenes themselves."""

import re
from collections.abc import Callable

from llavakd.shapes.scenes import Scene, Thing, caption

GRID = ["northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast"]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
STEPS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
AT = r"the thing in the (\w+)"
WAY = "(above|below|left of|right of)"
Parts = tuple[str, ...]


def spots(scene: Scene) -> dict[tuple[int, int], Thing]:
    return {(thing.cell % 3, thing.cell // 3): thing for thing in scene.things}


def thing_in(scene: Scene, place: str) -> tuple[int, int]:
    """The spot of that name; the question is unfair if nothing is there."""
    spot = (GRID.index(place) % 3, GRID.index(place) // 3)
    assert spot in spots(scene), f"nothing is in the {place} of {caption(scene)}"
    return spot


def said(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def place(scene: Scene, parts: Parts) -> str:
    spot = GRID.index(parts[0])
    found = spots(scene).get((spot % 3, spot // 3))
    return said(found) if found else "nothing"


def beside(scene: Scene, parts: Parts) -> str:
    (x, y), (dx, dy) = thing_in(scene, parts[1]), STEPS[parts[0]]
    if found := spots(scene).get((x + dx, y + dy)):
        return said(found)
    assert (x + 2 * dx, y + 2 * dy) not in spots(scene), "a thing further on makes 'nothing' arguable"
    return "nothing"


def bigger(scene: Scene, parts: Parts) -> str:
    one, other = (spots(scene)[thing_in(scene, place)].size for place in parts)
    return "yes" if (one, other) == ("big", "small") else "no"


def exists(scene: Scene, parts: Parts) -> str:
    return "yes" if any(thing.color == parts[0] for thing in scene.things) else "no"


def compare(scene: Scene, parts: Parts) -> str:
    one, other = (sum(t.color == color for t in scene.things) for color in parts)
    assert one, "the answer must not follow from a missing colour"
    assert other, "the answer must not follow from a missing colour"
    return "yes" if one > other else "no"


def twostep(scene: Scene, parts: Parts) -> str:
    (x, y), (dx, dy) = thing_in(scene, parts[1]), STEPS[parts[0]]
    return spots(scene)[x + dx, y + dy].color


ORACLE: dict[str, tuple[str, Callable[[Scene, Parts], str]]] = {
    "exists": (r"is there a (\w+) thing\?", exists),
    "count": (
        r"how many (\w+) things\?",
        lambda scene, parts: NUMBERS[sum(thing.color == parts[0] for thing in scene.things)],
    ),
    "place": (r"what is in the (\w+)\?", place),
    "color": (rf"what color is {AT}\?", lambda scene, parts: spots(scene)[thing_in(scene, parts[0])].color),
    "shape": (rf"what shape is {AT}\?", lambda scene, parts: spots(scene)[thing_in(scene, parts[0])].shape),
    "size": (rf"is {AT} big or small\?", lambda scene, parts: spots(scene)[thing_in(scene, parts[0])].size),
    "beside": (rf"what is {WAY} {AT}\?", beside),
    "bigger": (rf"is {AT} bigger than {AT}\?", bigger),
    "compare": (r"are there more (\w+) things than (\w+) things\?", compare),
    "twostep": (rf"what color is the thing {WAY} {AT}\?", twostep),
}


def answer_of(scene: Scene, question: str) -> str:
    """The oracle's answer, which fails where no kind or several fit the words."""
    fits = [(found.groups(), solve) for form, solve in ORACLE.values() if (found := re.fullmatch(form, question))]
    assert len(fits) == 1, question
    return fits[0][1](scene, fits[0][0])
