"""Questions about scenes, of ten kinds from easy to hard, with their true answers.

Most kinds draw the answer they want before they look for a question that has it, so that the commonest answer is a
poor guess: about half for yes and no, under 40 % for the rest.  A scene may not allow a kind, or not that answer.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, permutations, product
from typing import TypeVar

import numpy as np

from llavakd.shapes.scenes import COLORS, DIRECTIONS, PLACES, SHAPES, Scene, Thing

COUNTS = ("zero", "one", "two", "three", "four")
NOTHING = "nothing"

_COUNT_WEIGHTS = {0: 2, 1: 3, 2: 4, 3: 6, 4: 12}  # High counts are rare in scenes, so they are asked for more often.
_NOTHING_AT_PLACE = 0.15
_NOTHING_BESIDE = 0.10  # Lower than at a place: the other answers are given up more often for want of a neighbour.
_NEAR_MISS = 0.5

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question and its true answer, lower-case words with single spaces.

    Attributes:
        kind: A key of :data:`KINDS`.
        text: The question, which ends in a question mark.
        answer: One to three words.
    """

    kind: str
    text: str
    answer: str


def _pick(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.integers(len(items)))]


def _named_once(scene: Scene) -> list[Thing]:
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def _shaped_once(scene: Scene) -> list[Thing]:
    shapes = Counter(thing.shape for thing in scene.things)
    return [thing for thing in scene.things if shapes[thing.shape] == 1]


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _exists(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    present = {(thing.color, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        return f"is there a {_pick(scene.things, rng).name}?", _yes_no(True)
    # A near miss has a colour and a shape that are both in the scene, on different things.
    near = [pair for pair in product(COLORS, SHAPES) if pair not in present and _both_shown(pair, present)]
    absent = [pair for pair in product(COLORS, SHAPES) if pair not in present]
    color, shape = _pick(near if near and rng.random() < _NEAR_MISS else absent, rng)
    return f"is there a {color} {shape}?", _yes_no(False)


def _both_shown(pair: tuple[str, str], present: set[tuple[str, str]]) -> bool:
    return any(pair[0] == color for color, _ in present) and any(pair[1] == shape for _, shape in present)


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    shown = Counter(thing.color for thing in scene.things)
    counts = sorted({shown[color] for color in COLORS} & set(_COUNT_WEIGHTS))
    weights = np.cumsum([_COUNT_WEIGHTS[count] for count in counts])
    wanted = counts[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return f"how many {_pick([color for color in COLORS if shown[color] == wanted], rng)} things?", COUNTS[wanted]


def _place(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    if rng.random() < _NOTHING_AT_PLACE:
        empty = [cell for cell in range(len(PLACES)) if scene.at(cell) is None]
        return f"what is in the {PLACES[_pick(empty, rng)]}?", NOTHING
    thing = _pick(scene.things, rng)
    return f"what is in the {PLACES[thing.cell]}?", thing.name


def _where(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not (things := _named_once(scene)):
        return None
    thing = _pick(things, rng)
    return f"where is the {thing.name}?", PLACES[thing.cell]


def _color(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not (things := _shaped_once(scene)):
        return None
    thing = _pick(things, rng)
    return f"what color is the {thing.shape}?", thing.color


def _size(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not (things := _named_once(scene)):
        return None
    thing = _pick(things, rng)
    return f"is the {thing.name} big or small?", thing.size


def _neighbours(scene: Scene, anchors: list[Thing]) -> list[tuple[Thing, str, Thing]]:
    """All (anchor, direction, thing) with the thing in the very next cell."""
    rays = ((anchor, word, scene.outward(anchor, word)) for anchor in anchors for word in DIRECTIONS)
    return [(anchor, word, ray[0]) for anchor, word, ray in rays if ray and ray[0] is not None]


def _beside(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    anchors = _named_once(scene)
    if rng.random() < _NOTHING_BESIDE:
        # An empty next cell with a thing behind it would be "nothing" to some readers only, so it is not asked.
        bare = [(one, word) for one in anchors for word in DIRECTIONS if not any(scene.outward(one, word))]
        if not bare:
            return None
        anchor, word = _pick(bare, rng)
        return f"what is {word} the {anchor.name}?", NOTHING
    if not (found := _neighbours(scene, anchors)):
        return None
    anchor, word, thing = _pick(found, rng)
    return f"what is {word} the {anchor.name}?", thing.name


def _relation(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    pairs = list(permutations(_named_once(scene), 2))
    if not pairs:
        return None
    one, other = _pick(pairs, rng)
    truth = bool(rng.random() < 0.5)
    apart = (one.row - other.row, one.column - other.column)
    words = [word for word, step in DIRECTIONS.items() if (apart[0] * step[0] + apart[1] * step[1] > 0) == truth]
    return f"is the {one.name} {_pick(words, rng)} the {other.name}?", _yes_no(truth)


def _compare(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    # Both colours are always shown: were one absent, seeing the other would settle it without counting.
    shown = Counter(thing.color for thing in scene.things)
    pairs = list(permutations(shown, 2))
    truth = bool(rng.random() < 0.5)
    fitting = [pair for pair in pairs if (shown[pair[0]] > shown[pair[1]]) == truth]
    if not any(shown[one] > shown[other] for one, other in pairs):
        return None
    one, other = _pick(fitting, rng)
    return f"are there more {one} things than {other} things?", _yes_no(truth)


def _twostep(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    if not (found := _neighbours(scene, _shaped_once(scene))):
        return None
    anchor, word, thing = _pick(found, rng)
    return f"what color is the thing {word} the {anchor.shape}?", thing.color


KINDS: dict[str, Callable[[Scene, np.random.Generator], tuple[str, str] | None]] = {
    "exists": _exists,
    "count": _count,
    "place": _place,
    "where": _where,
    "color": _color,
    "size": _size,
    "beside": _beside,
    "relation": _relation,
    "compare": _compare,
    "twostep": _twostep,
}
"""What draws (question, answer) of each kind, or None where the scene does not allow what was drawn."""


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Draw one question of a kind.

    Args:
        scene: What it is about.
        kind: A key of :data:`KINDS`.
        rng: Decides the wanted answer and what is asked about.

    Returns:
        The question, or None where the scene does not allow the kind or the answer that was wanted.

    Raises:
        ValueError: If there is no such kind.
    """
    if kind not in KINDS:
        raise ValueError(f"got question kind {kind!r}, expected one of {list(KINDS)}; use one of those")
    drawn = KINDS[kind](scene, rng)
    return None if drawn is None else Question(kind=kind, text=drawn[0], answer=drawn[1])


def ask_several(scene: Scene, count: int, rng: np.random.Generator) -> list[Question]:
    """Draw different questions about one scene, of different kinds as far as the scene allows.

    Args:
        scene: What they are about.
        count: How many, at least 1 and at most 10.
        rng: Decides their kinds and order, and all that :func:`ask` needs.

    Raises:
        ValueError: If the count is out of range.
    """
    if not 1 <= count <= len(KINDS):
        raise ValueError(f"got {count} questions for a scene, expected 1 to {len(KINDS)}; ask for fewer")
    names = list(KINDS)
    found: dict[str, Question] = {}
    for kind in cycle(rng.permutation(len(names)).tolist()):
        question = ask(scene, names[kind], rng)
        if question is not None:
            found.setdefault(question.text, question)
        if len(found) == count:
            break
    return list(found.values())
