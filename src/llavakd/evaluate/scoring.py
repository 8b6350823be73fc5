"""Answers -> numbers."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from llavakd.evaluate.generate import Answer


def is_correct(prediction: str, truth: str) -> bool:
    """Exact match after folding case, outer white space and a final full stop."""
    return _fold(prediction) == _fold(truth)


def score(answers: Sequence[Answer]) -> dict[str, Any]:
    """Accuracy over all and by question type, each beside what the majority answer would get."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.sample.type or "all"].append(answer)
    return {
        "accuracy": _accuracy(answers),
        "n": len(answers),
        "majority": majority_share(answers),
        "by_type": {name: _accuracy(group) for name, group in sorted(groups.items())},
        "n_by_type": {name: len(group) for name, group in sorted(groups.items())},
        "majority_by_type": {name: majority_share(group) for name, group in sorted(groups.items())},
    }


def majority_share(answers: Sequence[Answer]) -> float:
    """Share of questions that have the file's most frequent answer: what saying it always would score."""
    return Counter(_fold(answer.truth) for answer in answers).most_common(1)[0][1] / len(answers)


def _accuracy(answers: Sequence[Answer]) -> float:
    return sum(is_correct(answer.prediction, answer.truth) for answer in answers) / len(answers)


def _fold(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()
