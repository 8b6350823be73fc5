"""Answers -> numbers, by the rules of the benchmarks' official scripts."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, mode
from typing import Any, NamedTuple

import yaml

from llavakd.data.samples import Sample
from llavakd.errors import UserError

_FILES = [Path(__file__).with_name(name) for name in ("vqa_words.yaml", "paper10.yaml")]
_WORDS, COLUMNS = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in _FILES)


class Answer(NamedTuple):
    """One question, its truth and what the model said."""

    sample: Sample
    prediction: str

    @property
    def truth(self) -> str:
        """The answer in the file."""
        return self.sample.turns[-1].text


def exact_match(answer: Answer) -> bool:
    """Exact match after folding case, outer white space and a final full stop."""
    return _fold(answer.prediction) == _fold(answer.truth)


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
    said, true = _yes(answer)
    return said == true


_METRICS: tuple[Callable[[Answer], float], ...] = (exact_match, vqa_accuracy, option_letter, yes_no)
METRICS = {metric.__name__: metric for metric in _METRICS}


def score(answers: Sequence[Answer], metric: str = "exact_match") -> dict[str, Any]:
    """Mean of a metric over all and by question type, each beside what the majority answer would get."""
    kinds = sorted({answer.sample.type or "all" for answer in answers})
    groups = {kind: [answer for answer in answers if (answer.sample.type or "all") == kind] for kind in kinds}
    return {
        "accuracy": fmean(map(METRICS[metric], answers)),
        "n": len(answers),
        "majority": majority_share(answers, metric),
        "by_type": {name: fmean(map(METRICS[metric], group)) for name, group in groups.items()},
        "n_by_type": {name: len(group) for name, group in groups.items()},
        "majority_by_type": {name: majority_share(group, metric) for name, group in groups.items()},
        **(yes_no_rates(answers) if metric == "yes_no" else {}),
    }


def majority_share(answers: Sequence[Answer], metric: str = "exact_match") -> float:
    """What saying the file's most frequent answer always would score."""
    common = mode(_fold(answer.truth) for answer in answers)
    said = next(answer.truth for answer in answers if _fold(answer.truth) == common)
    return fmean(METRICS[metric](answer._replace(prediction=said)) for answer in answers)


def yes_no_rates(answers: Sequence[Answer]) -> dict[str, float]:
    """Precision, recall and F1 of yes, and its share of the answers (POPE); 0 where nothing is to be divided by."""
    pairs = [_yes(answer) for answer in answers]
    (said, true), hits = map(sum, zip(*pairs, strict=True)), sum(map(all, pairs))
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


def _yes(answer: Answer) -> tuple[bool, bool]:
    """Whether the model says yes, and whether that is the truth."""
    said = answer.prediction.split(".")[0].replace(",", "").split(" ")
    return {"No", "no", "not"}.isdisjoint(said), _truth(answer, "[Yy]es|[Nn]o") in ("Yes", "yes")


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
