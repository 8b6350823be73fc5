"""Answers -> numbers, by the rules of the benchmarks' official scripts."""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from llavakd.errors import UserError
from llavakd.evaluate.generate import Answer

_WORDS, COLUMNS = (
    yaml.safe_load(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    for name in ("vqa_words.yaml", "paper10.yaml")
)


def is_correct(prediction: str, truth: str) -> bool:
    """Exact match after folding case, outer white space and a final full stop."""
    return _fold(prediction) == _fold(truth)


def vqa_accuracy(answer: Answer) -> float:
    """Soft accuracy: min(1, how many of the other nine people say it / 3), averaged over all ten (M4C evaluator)."""
    people = [normalize(text) for text in answer.sample.answers or (answer.truth,) * 10]
    same, total = people.count(normalize(answer.prediction)), len(people)
    return (same * min(1, (same - 1) / 3) + (total - same) * min(1, same / 3)) / total


def option_letter(answer: Answer) -> bool:
    """Whether the option's letter is right: `X`, `X. ...` or one `The answer is X.` (LLaVA, eval_science_qa.py)."""
    said = answer.prediction
    letters = re.findall(r"\A([A-Z])(?:\. .*)?\Z", said, re.DOTALL) or re.findall(r"The answer is ([A-Z]).", said)
    return letters == [_truth(answer, "[A-Z]")]


def yes_no(answer: Answer) -> bool:
    """Whether yes or no is right; an answer is no if its first sentence says no or not, else yes (POPE)."""
    return _says_yes(answer) == _is_yes(answer)


METRICS: dict[str, Callable[[Answer], float]] = {
    "exact_match": lambda answer: is_correct(answer.prediction, answer.truth),
    "vqa_accuracy": vqa_accuracy,
    "option_letter": option_letter,
    "yes_no": yes_no,
}


def score(answers: Sequence[Answer], metric: str = "exact_match") -> dict[str, Any]:
    """Mean of a metric over all and by question type, each beside what the majority answer would get."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.sample.type or "all"].append(answer)
    return {
        "accuracy": fmean(map(METRICS[metric], answers)),
        "n": len(answers),
        "majority": majority_share(answers, metric),
        "by_type": {name: fmean(map(METRICS[metric], group)) for name, group in sorted(groups.items())},
        "n_by_type": {name: len(group) for name, group in sorted(groups.items())},
        "majority_by_type": {name: majority_share(group, metric) for name, group in sorted(groups.items())},
        **(yes_no_rates(answers) if metric == "yes_no" else {}),
    }


def majority_share(answers: Sequence[Answer], metric: str = "exact_match") -> float:
    """What saying the file's most frequent answer always would score."""
    common = Counter(_fold(answer.truth) for answer in answers).most_common(1)[0][0]
    said = next(answer.truth for answer in answers if _fold(answer.truth) == common)
    return fmean(METRICS[metric](dataclasses.replace(answer, prediction=said)) for answer in answers)


def yes_no_rates(answers: Sequence[Answer]) -> dict[str, float]:
    """Precision, recall and F1 of yes, and its share of the answers (POPE); 0 where nothing is to be divided by."""
    said, true = sum(map(_says_yes, answers)), sum(map(_is_yes, answers))
    hits = sum(_says_yes(answer) and _is_yes(answer) for answer in answers)
    rates = {"precision": said, "recall": true, "f1": (said + true) / 2}
    return {name: hits / max(1, count) for name, count in rates.items()} | {"yes_share": said / len(answers)}


def normalize(text: str) -> str:
    """An answer as the VQA, VizWiz and TextVQA scripts compare it (EvalAI's answer processor)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = given = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _WORDS["punctuation"]:  # goes if anywhere beside a space, else becomes one
        text = text.replace(mark, "" if f"{mark} " in given or f" {mark}" in given else " ")
    words = (_WORDS["numbers"].get(word, word) for word in re.sub(r"\.(?!\d)", "", text).split())
    return " ".join(_WORDS["contractions"].get(word, word) for word in words if word not in _WORDS["articles"])


def _says_yes(answer: Answer) -> bool:
    return not {"No", "no", "not"} & set(answer.prediction.split(".")[0].replace(",", "").split(" "))


def _is_yes(answer: Answer) -> bool:
    return _truth(answer, "[Yy]es|[Nn]o") in ("Yes", "yes")


def _truth(answer: Answer, form: str) -> str:
    truth = answer.truth.removesuffix(".")
    if not re.fullmatch(form, truth):
        raise UserError(f"row {answer.sample.id!r}: its answer is {answer.truth!r}, but the metric takes {form} only")
    return truth


def column_scores(values: Mapping[str, float]) -> dict[str, float]:
    """Columns of the paper's table and their averages in percent, all that follow from TASK.METRIC values or columns."""
    known = dict(values)
    for name, column in COLUMNS.items():
        if column["mean"] and all(key in known for key in column["mean"]):
            known[name] = column.get("scale", 1) * fmean(known[key] for key in column["mean"])
    return {name: known[name] for name in COLUMNS if name in known}


def _fold(text: str) -> str:
    return text.strip().rstrip(".").strip().casefold()
