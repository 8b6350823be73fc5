"""Questions about scenes, of ten kinds from easy to hard, with their true answers.

Things are asked for by their place: finding one by its colour and shape is what models of this size never learnt
(docs/log.md).  Of most kinds the answer is drawn before a question that has it, so that the commonest is a poor guess:
about half for yes and no, under 40 % for the rest.  A scene may not allow a kind, or not the answer that was drawn.
"""

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle, permutations
from typing import NamedTuple

import numpy as np

from llavakd.shapes.scenes import COLORS, PLACES, SHAPES, SIDE, SIZES, WORLD, Scene

NOTHING, ANOTHER = "nothing", "another answer"
KINDS: dict[str, dict[str, float]] = WORLD["kinds"]
_COUNTS = (*KINDS["count"], "five")
_YES_NO = ("no", "yes")
_NAMES = (NOTHING, *(f"{color} {shape}" for color in COLORS for shape in SHAPES))
_SORTS = (_YES_NO, tuple(KINDS["count"]), COLORS, SHAPES, SIZES, _NAMES)


class Question(NamedTuple):
    """A question of a kind of KINDS and its true answer of one to three words, lower case with single spaces."""

    kind: str
    text: str
    answer: str


def _fair_questions(scene: Scene) -> Iterator[Question]:
    """All that can be asked about a scene."""
    things = {divmod(thing.cell, SIDE): thing for thing in scene.things}
    colors = Counter(thing.color for thing in scene.things)
    for color in COLORS:
        yield Question("exists", f"is there a {color} thing?", _YES_NO[color in colors])
        yield Question("count", f"how many {color} things?", _COUNTS[colors[color]])
    # Both colours are always shown: were one absent, seeing the other would settle it without counting.
    for one, other in permutations(colors, 2) if len(set(colors.values())) > 1 else ():
        more = _YES_NO[colors[one] > colors[other]]
        yield Question("compare", f"are there more {one} things than {other} things?", more)
    for cell, place in enumerate(PLACES):
        found = things.get(divmod(cell, SIDE))
        yield Question("place", f"what is in the {place}?", found.name if found else NOTHING)
    for (row, column), thing in things.items():
        it = f"the thing in the {PLACES[thing.cell]}"
        yield Question("color", f"what color is {it}?", thing.color)
        yield Question("shape", f"what shape is {it}?", thing.shape)
        yield Question("size", f"is {it} big or small?", thing.size)
        for direction, (down, along) in WORLD["directions"].items():
            near, far = (things.get((row + steps * down, column + steps * along)) for steps in (1, 2))
            if near:
                yield Question("beside", f"what is {direction} {it}?", near.name)
                yield Question("twostep", f"what color is the thing {direction} {it}?", near.color)
            elif not far:  # with a thing behind the empty cell, it would be "nothing" to some readers only
                yield Question("beside", f"what is {direction} {it}?", NOTHING)
    for thing, second in permutations(scene.things, 2) if len({thing.size for thing in scene.things}) > 1 else ():
        it, that = (f"the thing in the {PLACES[one.cell]}" for one in (thing, second))
        yield Question("bigger", f"is {it} bigger than {that}?", _YES_NO[(thing.size, second.size) == ("big", "small")])


_fair = lru_cache(maxsize=1)(lambda scene: tuple(_fair_questions(scene)))  # a scene is asked about several times


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Draw a question of a kind of KINDS; None where the scene does not allow it or the wanted answer."""
    assert kind in KINDS, f"got question kind {kind!r}, expected one of {list(KINDS)}"
    fitting: dict[str, list[Question]] = {ANOTHER: []}
    for question in _fair(scene):
        if question.kind == kind:
            fitting.setdefault(question.answer if question.answer in KINDS[kind] else ANOTHER, []).append(question)
    shares = {answer: share for answer, share in KINDS[kind].items() if answer in fitting}
    weights = np.array([*shares.values()])
    several = fitting[rng.choice([*shares], p=weights / weights.sum()) if shares else ANOTHER]
    return several[int(rng.integers(len(several)))] if several else None


def ask_several(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """Draw `count` (1 to 10) different questions about a scene, of different kinds where it allows."""
    assert 1 <= count <= len(KINDS), f"got {count} questions for a scene, expected 1 to {len(KINDS)}"
    found: list[Question] = []
    kinds = cycle(rng.permutation(list(KINDS)).tolist())
    while len(found) < count:
        question = ask(scene, next(kinds), rng)
        if question and question not in found:
            found.append(question)
    return found


def mistaken(question: Question, rng: np.random.Generator) -> Question:
    """The same question with a wrong answer, any other of its sort as likely as the next."""
    sort = next(answers for answers in _SORTS if question.answer in answers)
    return question._replace(answer=str(rng.choice([answer for answer in sort if answer != question.answer])))
