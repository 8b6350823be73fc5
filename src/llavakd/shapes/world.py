"""Write a Shapes world to a folder that any reader of LLaVA data can read."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from llavakd.shapes.drawing import draw
from llavakd.shapes.questions import KINDS, Question, ask, ask_several
from llavakd.shapes.scenes import SPLITS, Scene, caption, scene_in

DESCRIBE = "describe the picture."
IMAGE_TAG = "<image>\n"
FILES = ("pretrain", "instruct", "text", "mixed", "val", "test")

_EXAM_QUESTIONS = 3  # Questions about each picture of val and test.
_MANY_TURNS = 0.6  # Share of train scenes asked about in one long conversation rather than two short ones.
_TEXT_ONLY = 0.09  # Rows without a picture for each train scene; with 1.4 rows that have one, about 6 % of all.
_RETOLD = 1 / 3  # Share of text rows that tell the scene once more.
_CHUNK = 250  # Scenes in one piece of work.
_SHUFFLE = len(SPLITS)  # Seeds the order of rows, apart from all splits.

Rows = dict[str, list[str]]
Turns = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class WorldSummary:
    """What was written.

    Attributes:
        directory: The folder, with ``images/`` and the six JSON files.
        pictures: Pictures in ``images/``, over all splits.
        rows: Rows by the name of the JSON file, without ``.json``.
    """

    directory: Path
    pictures: int
    rows: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Scenes start to stop of a split, and the questions of the whole split if it is an exam."""

    images: Path
    seed: int
    split: str
    start: int
    stop: int
    questions: int


def _row(name: str, turns: Turns, *, image: str | None = None, kind: str | None = None) -> str:
    """One LLaVA row as a line of JSON: workers hand back text, which is several times smaller than objects."""
    row: dict[str, object] = {"id": name}
    if image is not None:
        row["image"] = image
        turns = [(IMAGE_TAG + turns[0][0], turns[0][1]), *turns[1:]]
    row["conversations"] = [
        {"from": speaker, "value": value}
        for turn in turns
        for speaker, value in zip(("human", "gpt"), turn, strict=True)
    ]
    if kind is not None:
        row["type"] = kind
    return json.dumps(row)


def _turns(questions: Sequence[Question]) -> Turns:
    return [(question.text, question.answer) for question in questions]


def _tell(scene: Scene, turns: Turns, rng: np.random.Generator) -> Turns:
    """The scene in words before the first turn, in place of a picture."""
    return [(f"scene: {caption(scene, rng)} {turns[0][0]}", turns[0][1]), *turns[1:]]


def _save(scene: Scene, path: Path, rng: np.random.Generator) -> None:
    draw(scene, rng).save(path, compress_level=1)  # Noise hardly packs, so more effort buys nothing.


def _train_scene(job: _Job, index: int, rng: np.random.Generator) -> Rows:
    scene = scene_in("train", rng)
    name = f"{index:06d}"
    image = f"{name}.png"
    _save(scene, job.images / image, rng)
    if rng.random() < _MANY_TURNS:
        conversations = [_turns(ask_several(scene, int(rng.integers(3, 6)), rng))]
    else:
        conversations = [[turn] for turn in _turns(ask_several(scene, 2, rng))]
    instruct = [_row(f"{name}-{number}", turns, image=image) for number, turns in enumerate(conversations)]
    if rng.random() < _TEXT_ONLY:
        told = scene_in("text", rng)
        instruct.append(_row(f"{name}-text", _tell(told, _turns(ask_several(told, 1, rng)), rng)))
    return {"pretrain": [_row(name, [(DESCRIBE, caption(scene, rng))], image=image)], "instruct": instruct}


def _text_scene(job: _Job, index: int, rng: np.random.Generator) -> Rows:
    scene = scene_in("text", rng)
    if rng.random() < _RETOLD:
        turns = [(DESCRIBE, caption(scene, rng))]  # in another order than it was told: every thing is looked up
    else:
        turns = _turns(ask_several(scene, 1 + int(rng.integers(3, 6)), rng))
    turns = _tell(scene, turns, rng)
    return {"text": [_row(f"text-{index:06d}", turns)]}


def _exam_scene(job: _Job, index: int, rng: np.random.Generator) -> Rows:
    """Kinds go round over all questions of the split; scenes are drawn until one allows all three that are due."""
    numbers = range(index * _EXAM_QUESTIONS, min((index + 1) * _EXAM_QUESTIONS, job.questions))
    kinds = [list(KINDS)[number % len(KINDS)] for number in numbers]
    questions: list[Question] = []
    while len(questions) < len(kinds):
        scene = scene_in(job.split, rng)
        questions = [found for kind in kinds if (found := ask(scene, kind, rng)) is not None]
    name = f"{job.split}-{index:06d}"
    _save(scene, job.images / f"{name}.png", rng)
    rows = [
        _row(f"{name}-{number}", _turns([question]), image=f"{name}.png", kind=question.kind)
        for number, question in enumerate(questions)
    ]
    return {job.split: rows}


_WRITERS: dict[str, Callable[[_Job, int, np.random.Generator], Rows]] = {
    "train": _train_scene,
    "text": _text_scene,
    "val": _exam_scene,
    "test": _exam_scene,
}


def _work(job: _Job) -> Rows:
    rows: Rows = {}
    for index in range(job.start, job.stop):
        rng = np.random.default_rng((job.seed, SPLITS.index(job.split), index))
        for file, more in _WRITERS[job.split](job, index, rng).items():
            rows.setdefault(file, []).extend(more)
    return rows


def _results(jobs: Sequence[_Job], workers: int) -> Iterator[Rows]:
    if workers == 1:
        yield from map(_work, jobs)
        return
    # Not forked: the caller may hold threads, as everyone does who has imported torch.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_work, jobs)


def _jobs(images: Path, *, scenes: int, seed: int, test_questions: int) -> list[_Job]:
    questions = {"train": 0, "text": 0, "val": test_questions // 2, "test": test_questions}
    sizes = {"train": scenes, "text": 2 * scenes}
    sizes |= {split: -(-questions[split] // _EXAM_QUESTIONS) for split in ("val", "test")}
    return [
        _Job(
            images=images,
            seed=seed,
            split=split,
            start=start,
            stop=min(start + _CHUNK, size),
            questions=questions[split],
        )
        for split, size in sizes.items()
        for start in range(0, size, _CHUNK)
    ]


def _write_list(path: Path, lines: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as handle:
        for place, line in enumerate(lines):
            handle.write(("[\n" if place == 0 else ",\n") + line)
        handle.write("\n]\n")


def _check(directory: Path, **least: tuple[int, int]) -> None:
    for name, (got, minimum) in least.items():
        if got < minimum:
            raise ValueError(f"got {name}={got}, expected at least {minimum}; raise {name}")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise ValueError(f"got {directory}, expected a new or empty folder; choose another or empty it")


def write_world(
    directory: Path,
    *,
    scenes: int,
    seed: int,
    test_questions: int = 1000,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> WorldSummary:
    """Write pictures and conversations of a Shapes world; the same seed gives the same bytes.

    In the folder there will be ``images/`` and six JSON lists of LLaVA rows, whose ``image`` is relative to
    ``images/``: ``pretrain`` (a caption for each train picture), ``instruct`` (questions about the train pictures
    and a few about scenes told in words), ``text`` (two rows without picture for each train scene), ``mixed`` (the
    first two and an eighth of the third) and ``val`` and ``test`` (one question a row, with its kind as ``type``).  No scene of one split appears in another; captions in
    ``text`` and told in ``instruct`` are of the split ``text``.

    Args:
        directory: Where to write; made if missing.
        scenes: Train scenes, at least 1.
        seed: Decides everything, 0 or more.
        test_questions: Rows of ``test``, at least 2; ``val`` has half as many.
        workers: Processes that draw, at least 1; the outcome does not depend on it.
        progress: Called with (scenes done, scenes in all) now and then, all splits together.

    Returns:
        What was written.

    Raises:
        ValueError: If the directory is not an empty folder or a number is too small.
    """
    _check(directory, scenes=(scenes, 1), seed=(seed, 0), test_questions=(test_questions, 2), workers=(workers, 1))
    images = directory / "images"
    images.mkdir(parents=True)
    jobs = _jobs(images, scenes=scenes, seed=seed, test_questions=test_questions)
    total, done = sum(job.stop - job.start for job in jobs), 0
    rows: Rows = {file: [] for file in FILES}
    for job, part in zip(jobs, _results(jobs, workers), strict=True):
        for file, more in part.items():
            rows[file].extend(more)
        done += job.stop - job.start
        if progress is not None:
            progress(done, total)
    # A scene's rows were made one after another, which would put them into one batch.
    order = np.random.default_rng((seed, _SHUFFLE)).permutation(len(rows["instruct"]))
    rows["instruct"] = [rows["instruct"][place] for place in order]
    rows["mixed"] = [*rows["pretrain"], *rows["instruct"], *rows["text"][::8]]
    order = np.random.default_rng((seed, _SHUFFLE + 1)).permutation(len(rows["mixed"]))
    rows["mixed"] = [rows["mixed"][place] for place in order]
    for file, lines in rows.items():
        _write_list(directory / f"{file}.json", lines)
    pictures = sum(job.stop - job.start for job in jobs if job.split != "text")
    return WorldSummary(directory=directory, pictures=pictures, rows={file: len(lines) for file, lines in rows.items()})
