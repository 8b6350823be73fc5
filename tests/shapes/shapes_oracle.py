"""The true answer of a question by its words, sharing no code with the package but the scenes themselves."""

import re
from collections.abc import Callable

from llavakd.shapes.scenes import Scene, Thing, caption

GRID = ["northwest", "north", "northeast", "west", "center", "east", "southwest", "south", "southeast"]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
STEPS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
WAY = "(above|below|left of|right of)"
Parts = tuple[str, ...]


def spots(scene: Scene) -> dict[tuple[int, int], Thing]:
    return {(thing.cell % 3, thing.cell // 3): thing for thing in scene.things}


def only(scene: Scene, words: str) -> tuple[int, int]:
    """The spot of the one thing of that shape, or colour and shape; the question is unfair if there are more."""
    matching = [spot for spot, t in spots(scene).items() if f"{t.color} {t.shape}".endswith(words)]
    assert len(matching) == 1, f"{words!r} is not unique in {caption(scene)}"
    return matching[0]


def said(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def place(scene: Scene, parts: Parts) -> str:
    spot = GRID.index(parts[0])
    found = spots(scene).get((spot % 3, spot // 3))
    return said(found) if found else "nothing"


def beside(scene: Scene, parts: Parts) -> str:
    (x, y), (dx, dy) = only(scene, parts[1]), STEPS[parts[0]]
    if found := spots(scene).get((x + dx, y + dy)):
        return said(found)
    assert (x + 2 * dx, y + 2 * dy) not in spots(scene), "a thing further on makes 'nothing' arguable"
    return "nothing"


def relation(scene: Scene, parts: Parts) -> str:
    (x, y), (u, v) = only(scene, parts[0]), only(scene, parts[2])
    truth = {"above": y < v, "below": y > v, "left of": x < u, "right of": x > u}[parts[1]]
    return "yes" if truth else "no"


def compare(scene: Scene, parts: Parts) -> str:
    one, other = (sum(t.color == color for t in scene.things) for color in parts)
    assert one, "the answer must not follow from a missing colour"
    assert other, "the answer must not follow from a missing colour"
    return "yes" if one > other else "no"


def twostep(scene: Scene, parts: Parts) -> str:
    (x, y), (dx, dy) = only(scene, parts[1]), STEPS[parts[0]]
    return spots(scene)[x + dx, y + dy].color


ORACLE: dict[str, tuple[str, Callable[[Scene, Parts], str]]] = {
    "exists": (
        r"is there a (\w+ \w+)\?",
        lambda scene, parts: "yes" if parts[0] in map(said, scene.things) else "no",
    ),
    "count": (
        r"how many (\w+) things\?",
        lambda scene, parts: NUMBERS[sum(thing.color == parts[0] for thing in scene.things)],
    ),
    "place": (r"what is in the (\w+)\?", place),
    "where": (
        r"where is the (\w+ \w+)\?",
        lambda scene, parts: GRID[only(scene, parts[0])[0] + 3 * only(scene, parts[0])[1]],
    ),
    "color": (r"what color is the (\w+)\?", lambda scene, parts: spots(scene)[only(scene, parts[0])].color),
    "size": (r"is the (\w+ \w+) big or small\?", lambda scene, parts: spots(scene)[only(scene, parts[0])].size),
    "beside": (rf"what is {WAY} the (\w+ \w+)\?", beside),
    "relation": (rf"is the (\w+ \w+) {WAY} the (\w+ \w+)\?", relation),
    "compare": (r"are there more (\w+) things than (\w+) things\?", compare),
    "twostep": (rf"what color is the thing {WAY} the (\w+)\?", twostep),
}


def answer_of(scene: Scene, question: str) -> str:
    """The oracle's answer, which fails where no kind or several fit the words."""
    fits = [(found.groups(), solve) for form, solve in ORACLE.values() if (found := re.fullmatch(form, question))]
    assert len(fits) == 1, question
    return fits[0][1](scene, fits[0][0])
