"""Questions about scenes, of ten kinds from easy to hard, with their true answers.

Things are asked for by their place: finding one by its colour and shape is what models of this size never learnt
(docs/log.md). Most kinds draw the answer they want before they look for a question that has it, so that the commonest
answer is a poor guess: about half for yes and no, under 40 % for the rest.  A scene may not allow a kind, or not that
answer.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle, permutations

import numpy as np

from llavakd.errors import UserError
from llavakd.shapes.scenes import COLORS, DIRECTIONS, PLACES, SHAPES, SIZES, Scene, Thing

COUNTS = ("zero", "one", "two", "three", "four")
NOTHING = "nothing"

_YES_NO = {True: "yes", False: "no"}
_NAMES = (NOTHING, *(f"{color} {shape}" for color in COLORS for shape in SHAPES))
_ANSWERS = (tuple(_YES_NO.values()), COUNTS, COLORS, SHAPES, SIZES, _NAMES)
_COUNT_WEIGHTS = {0: 2, 1: 3, 2: 4, 3: 6, 4: 12}  # High counts are rare in scenes, so they are asked for more often.
_NOTHING_AT_PLACE = 0.15
_NOTHING_BESIDE = 0.10  # Lower than at a place: the other answers are given up more often for want of a neighbour.

# (question, answer): all that the scene allows of what was drawn, one as good as another
Fitting = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question of a kind of KINDS and its true answer of one to three words, lower case with single spaces."""

    kind: str
    text: str
    answer: str


def _at(thing: Thing) -> str:
    return f"the thing in the {PLACES[thing.cell]}"


def _neighbours(scene: Scene) -> list[tuple[Thing, str, Thing]]:
    """All (anchor, direction, thing) with the thing in the very next cell."""
    rays = ((anchor, word, scene.outward(anchor, word)) for anchor in scene.things for word in DIRECTIONS)
    return [(anchor, word, ray[0]) for anchor, word, ray in rays if ray and ray[0] is not None]


def _exists(scene: Scene, rng: np.random.Generator) -> Fitting:
    truth = bool(rng.random() < 0.5)
    shown = {thing.color for thing in scene.things}
    return [(f"is there a {color} thing?", _YES_NO[truth]) for color in COLORS if (color in shown) == truth]


def _count(scene: Scene, rng: np.random.Generator) -> Fitting:
    shown = Counter(thing.color for thing in scene.things)
    counts = sorted({shown[color] for color in COLORS} & set(_COUNT_WEIGHTS))
    weights = np.cumsum([_COUNT_WEIGHTS[count] for count in counts])
    wanted = counts[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return [(f"how many {color} things?", COUNTS[wanted]) for color in COLORS if shown[color] == wanted]


def _place(scene: Scene, rng: np.random.Generator) -> Fitting:
    if rng.random() < _NOTHING_AT_PLACE:
        empty = [place for cell, place in enumerate(PLACES) if scene.at(cell) is None]
        return [(f"what is in the {place}?", NOTHING) for place in empty]
    return [(f"what is in the {PLACES[thing.cell]}?", thing.name) for thing in scene.things]


def _beside(scene: Scene, rng: np.random.Generator) -> Fitting:
    if rng.random() < _NOTHING_BESIDE:
        # An empty next cell with a thing behind it would be "nothing" to some readers only, so it is not asked.
        bare = [(one, word) for one in scene.things for word in DIRECTIONS if not any(scene.outward(one, word))]
        return [(f"what is {word} {_at(one)}?", NOTHING) for one, word in bare]
    return [(f"what is {word} {_at(one)}?", thing.name) for one, word, thing in _neighbours(scene)]


def _bigger(scene: Scene, rng: np.random.Generator) -> Fitting:
    truth = bool(rng.random() < 0.5)
    if len({thing.size for thing in scene.things}) == 1:
        return []
    return [
        (f"is {_at(one)} bigger than {_at(other)}?", _YES_NO[truth])
        for one, other in permutations(scene.things, 2)
        if ((one.size, other.size) == ("big", "small")) == truth
    ]


def _compare(scene: Scene, rng: np.random.Generator) -> Fitting:
    # Both colours are always shown: were one absent, seeing the other would settle it without counting.
    shown = Counter(thing.color for thing in scene.things)
    truth = bool(rng.random() < 0.5)
    if len(set(shown.values())) == 1:
        return []
    pairs = [(one, other) for one, other in permutations(shown, 2) if (shown[one] > shown[other]) == truth]
    return [(f"are there more {one} things than {other} things?", _YES_NO[truth]) for one, other in pairs]


KINDS: dict[str, Callable[[Scene, np.random.Generator], Fitting]] = {
    "exists": _exists,
    "count": _count,
    "compare": _compare,
    "place": _place,
    "color": lambda scene, _: [(f"what color is {_at(one)}?", one.color) for one in scene.things],
    "shape": lambda scene, _: [(f"what shape is {_at(one)}?", one.shape) for one in scene.things],
    "size": lambda scene, _: [(f"is {_at(one)} big or small?", one.size) for one in scene.things],
    "bigger": _bigger,
    "beside": _beside,
    "twostep": lambda scene, _: [
        (f"what color is the thing {word} {_at(one)}?", thing.color) for one, word, thing in _neighbours(scene)
    ],
}


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Draw a question of a kind of KINDS, else UserError; None where the scene does not allow it or the wanted answer."""
    if kind not in KINDS:
        raise UserError(f"got question kind {kind!r}, expected one of {list(KINDS)}; use one of those")
    fitting = KINDS[kind](scene, rng)
    if not fitting:
        return None
    text, answer = fitting[int(rng.integers(len(fitting)))]
    return Question(kind=kind, text=text, answer=answer)


def ask_several(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """Draw `count` (1 to 10, else UserError) different questions about a scene, of different kinds where it allows."""
    if not 1 <= count <= len(KINDS):
        raise UserError(f"got {count} questions for a scene, expected 1 to {len(KINDS)}; ask for fewer")
    found: dict[str, Question] = {}
    names = list(KINDS)
    for kind in cycle(rng.permutation(len(names)).tolist()):
        if (question := ask(scene, names[kind], rng)) is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())


def mistaken(question: Question, rng: np.random.Generator) -> Question:
    """The same question with a wrong answer, any other of its sort as likely as the next."""
    sort = next(answers for answers in _ANSWERS if question.answer in answers)
    return replace(question, answer=str(rng.choice([answer for answer in sort if answer != question.answer])))
