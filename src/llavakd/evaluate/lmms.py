"""Benchmarks through lmms-eval 0.7.3: tasks and scoring are its, answers ours. Imported only where it is asked for."""

import contextlib
import copy
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openpyxl  # noqa: F401 - MMBench's submission is a spreadsheet; its lack would show after the last answer only
import torch
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from loguru import logger
from PIL import ImageFile
from tenacity import RetryError

from llavakd.config import DataConfig, EvaluationConfig, TeacherConfig
from llavakd.data.samples import IMAGE_TAG, Sample, Turn
from llavakd.errors import UserError, nearest
from llavakd.evaluate import generate_answers
from llavakd.evaluate.scoring import COLUMNS, column_scores
from llavakd.models.student import VisionLanguageModel, load_teacher
from llavakd.progress import bar

ImageFile.LOAD_TRUNCATED_IMAGES = False  # lmms-eval would show half of a damaged picture
_PAPER_TASKS = {task: column["config"] for column in COLUMNS.values() if "config" in column for task in column["tasks"]}


class Adapter(lmms):
    """A model as lmms-eval sees it: texts and PIL pictures in, greedy answers out, in batches."""

    accelerator = loglikelihood = generate_until_multi_round = None  # one process; tasks that ask for these are refused

    def __init__(self, model: VisionLanguageModel, data: DataConfig, evaluation: EvaluationConfig) -> None:
        super().__init__()
        self.student, self.data, self.evaluation = model, data, evaluation

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One text a request, cut at its first stop word."""
        at_once, texts = 8 * self.evaluation.batch_size, list[str]()  # requests whose pictures are in memory
        with bar("answer", len(requests)) as advance:
            for limit, group in itertools.groupby(requests, lambda request: request.args[1].get("max_new_tokens")):
                sizes = dataclasses.replace(self.evaluation, max_new_tokens=limit or self.evaluation.max_new_tokens)
                while window := list(itertools.islice(group, at_once)):
                    samples = [self._sample(*request.args) for request in window]
                    answers = generate_answers(self.student, samples, self.data, sizes, "")
                    texts += [answer.prediction for answer in answers]
                    advance(len(texts))
        for index, request in enumerate(requests):
            for stop in request.args[1].get("until") or ():
                texts[index] = texts[index].partition(stop)[0]
        return texts

    def _sample(self, context: str, _: Any, doc_to_visual: Any, number: int, task: str, split: str) -> Sample:
        pictures = [picture for picture in doc_to_visual(self.task_dict[task][split][number]) or () if picture]
        # As in a row of a file, pictures stand in front of the question.
        question = Turn(role="user", text=context.replace(IMAGE_TAG, "").strip(), images=len(pictures))
        return Sample(id=f"{task} {number}", images=tuple(pictures), turns=(question, Turn(role="assistant", text="")))


def evaluate_tasks(
    source: TeacherConfig,
    names: Sequence[str],
    data: DataConfig,
    evaluation: EvaluationConfig,
    out: Path,
    *,
    include: Path | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Answer and score lmms-eval tasks; returns a results row whose `benchmarks` are in percent.

    `names`: `paper10`, columns of paper10.yaml, tasks or groups; `include`: a folder of more; `limit`: questions of each.
    Columns are named as there, other scores TASK.METRIC. OUT/MODEL gets lmms_eval.json (answers, settings) and
    submissions/ (files for servers). Raises UserError: a task unknown, without data, or not of greedy generation.
    """
    logger.remove()  # lmms-eval's warnings go to standard output, where the caller may want one JSON object
    logger.add(sys.stderr, level="WARNING")
    manager = TaskManager(include_path=str(include) if include else None)
    tasks = _load_tasks(names, manager)
    model = load_teacher(source, "cuda" if torch.cuda.is_available() else "cpu")
    place, start = out / Path(source.path).name, time.time()
    place.mkdir(parents=True, exist_ok=True)
    written = SimpleNamespace(output_path=str(place), process_with_media=False)
    # MMMU guesses where it finds no letter; one thread, so that the guesses keep their order.
    settings: dict[str, Any] = {"random_seed": 42, "process_docs_parallel": 1, "bootstrap_iters": 0, "limit": limit}
    with contextlib.redirect_stdout(sys.stderr):  # so do some of its prints
        answering = Adapter(model, data, evaluation)
        found = simple_evaluate(answering, tasks=[*tasks.values()], task_manager=manager, cli_args=written, **settings)
    (place / "lmms_eval.json").write_text(json.dumps(found, ensure_ascii=False, default=str), encoding="utf-8")
    told = ((f"{task}.{key}", value) for task, row in found["results"].items() for key, value in row.items())
    numbers = ((key, value) for key, value in told if isinstance(value, int | float) and "_stderr" not in key)
    values = {key.removesuffix(",none"): value for key, value in numbers}
    return {
        "name": place.name,
        "n": sum(map(len, found["samples"].values())),
        "benchmarks": column_scores(values),
        "values": values,
        "servers": {key: c["server"] for key, c in COLUMNS.items() if "server" in c and c["tasks"][0] in tasks},
        "submissions": [str(p) for p in sorted(place.glob("submissions/*")) if p.stat().st_mtime > start - 1],
        "parameters": model.model.num_parameters(),
    }


def circular_accuracy(results: Sequence[dict[str, Any]]) -> float:
    """MMBench in percent: a question counts where all its rotations, whose index differs by 1e6, are right."""
    return 100 * MMBench_Evaluator().eval_result(results, eval_method="static")[0]


def _load_tasks(names: Sequence[str], manager: TaskManager) -> dict[str, Any]:
    """Task name -> task; those of the paper's columns with the paper's prompts and limits."""
    groups = {task: [task] for task in manager.all_tasks} | {"paper10": list(_PAPER_TASKS)}
    groups |= {name: column["tasks"] for name, column in COLUMNS.items() if "tasks" in column}
    tasks: dict[str, Any] = {}
    for name in names:
        if name not in groups:
            raise UserError(f"--tasks: no task {name!r}{nearest(name, groups)}; --include names a folder of more")
        for task in groups[name]:
            try:
                loaded = get_task_dict([{"task": task, **copy.deepcopy(_PAPER_TASKS.get(task, {}))}], manager)
            except RetryError as error:
                raise UserError(f"--tasks: no data for {task}: {error.last_attempt.exception()}") from error
            tasks |= {output.task_name: output.task for output in get_task_list(loaded)}
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until" or task.config.generation_kwargs.get("do_sample"):
            raise UserError(f"--tasks: {name} asks for {task.OUTPUT_TYPE} or samples; only greedy texts are given")
        if name in _PAPER_TASKS and "gpt_eval_score" in task.aggregation():  # its own asks a chat service
            task.aggregation()["gpt_eval_score"] = circular_accuracy
    return tasks
