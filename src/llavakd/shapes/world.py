"""Write a Shapes world to a folder that any reader of LLaVA data can read."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from llavakd.errors import UserError
from llavakd.shapes.drawing import draw
from llavakd.shapes.questions import KINDS, Question, ask, ask_several, mistaken
from llavakd.shapes.scenes import SPLITS, Scene, caption, scene_in

_EXAM_QUESTIONS = 3  # Questions about each picture of val and test.
_MANY_TURNS = 0.6  # Share of train scenes asked about in one long conversation rather than two short ones.
_TEXT_ONLY = 0.09  # Rows without a picture for each train scene; with 1.4 rows that have one, about 6 % of all.
_RETOLD = 1 / 3  # Share of text rows that tell the scene once more.
_COMPRESS = 1  # Noise hardly packs, so more effort buys nothing.
_CHUNK = 250  # Scenes that a worker draws, and that progress goes on, at a time.
_SHUFFLE = len(SPLITS)  # Seeds the order of rows (two of them), apart from all splits.
_SLIPS = _SHUFFLE + 2  # Seeds the wrong answers: everything else is the same with and without them.

Row = tuple[str, str]  # file, and the row as a line of JSON, several times smaller than objects to hand back


@dataclass(frozen=True, kw_only=True)
class WorldSummary:
    """What was written: the number of pictures over all splits, and of rows by JSON file (without `.json`)."""

    directory: Path
    pictures: int
    rows: dict[str, int]


def _row(name: str, talk: Sequence[Question], *, image: str = "", told: str = "", kind: str = "") -> str:
    """A LLaVA row about a picture, or about a scene that is `told` in words."""
    values = [value for question in talk for value in (question.text, question.answer)]
    values[0] = (f"scene: {told} " if told else "<image>\n") + values[0]
    turns = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
    row = {"id": name, "image": image, "conversations": turns, "type": kind}
    return json.dumps({key: value for key, value in row.items() if value})


def _description(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("describe", "describe the picture.", caption(scene, rng))]


def _train_rows(image: Path, noise: float, rng: np.random.Generator, slips: np.random.Generator) -> Iterator[Row]:
    def answered(scene: Scene, count: int) -> list[Question]:
        asked = ask_several(scene, count, rng)
        return [mistaken(question, slips) if slips.random() < noise else question for question in asked]

    scene = scene_in("train", rng)
    draw(scene, rng).save(image, compress_level=_COMPRESS)
    if rng.random() < _MANY_TURNS:
        talks = [answered(scene, int(rng.integers(3, 6)))]
    else:
        talks = [[question] for question in answered(scene, 2)]
    for number, talk in enumerate(talks):
        yield "instruct", _row(f"{image.stem}-{number}", talk, image=image.name)
    if rng.random() < _TEXT_ONLY:
        scene_told = scene_in("text", rng)
        yield "instruct", _row(f"{image.stem}-text", answered(scene_told, 1), told=caption(scene_told, rng))
    yield "pretrain", _row(image.stem, _description(scene, rng), image=image.name)


def _text_rows(name: str, rng: np.random.Generator) -> Iterator[Row]:
    scene = scene_in("text", rng)
    retold = rng.random() < _RETOLD  # in another order than it was told, so that every thing is looked up
    talk = _description(scene, rng) if retold else ask_several(scene, 1 + int(rng.integers(3, 6)), rng)
    yield "text", _row(name, talk, told=caption(scene, rng))


def _exam_rows(image: Path, split: str, numbers: range, rng: np.random.Generator) -> Iterator[Row]:
    """Kinds go round over all questions of the split; scenes are drawn until one allows all kinds that are due."""
    due = [list(KINDS)[number % len(KINDS)] for number in numbers]
    questions: list[Question] = []
    while len(questions) < len(due):
        scene = scene_in(split, rng)
        questions = [question for kind in due if (question := ask(scene, kind, rng))]
    draw(scene, rng).save(image, compress_level=_COMPRESS)
    for number, question in enumerate(questions):
        yield split, _row(f"{image.stem}-{number}", [question], image=image.name, kind=question.kind)


def _work(images: Path, seed: int, noise: float, exams: dict[str, range], place: tuple[str, int]) -> list[Row]:
    """The rows of scene `index` of a split, its picture written; `exams` numbers the questions of val and test."""
    split, index = place
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    if split == "train":
        slips = np.random.default_rng((seed, _SLIPS, index))
        return list(_train_rows(images / f"{index:06d}.png", noise, rng, slips))
    if split == "text":
        return list(_text_rows(f"text-{index:06d}", rng))
    due = exams[split][index * _EXAM_QUESTIONS :][:_EXAM_QUESTIONS]
    return list(_exam_rows(images / f"{split}-{index:06d}.png", split, due, rng))


def examples(count: int) -> list[tuple[Image.Image, Question]]:
    """The same few pictures of the test split every time, each with a question."""
    rng = np.random.default_rng(0)
    scenes = (scene_in("test", rng) for _ in range(count))
    return [(draw(scene, rng), ask_several(scene, 1, rng)[0]) for scene in scenes]


def write_world(
    directory: Path,
    *,
    scenes: int,
    seed: int,
    test_questions: int = 1000,
    noise: float = 0.0,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> WorldSummary:
    """Write pictures and conversations of a Shapes world; the same seed gives the same bytes.

    The folder, new or empty, gets `images/` and six JSON lists of LLaVA rows, whose `image` is relative to `images/`:
    `pretrain` (a caption for each train picture), `instruct` (questions about the train pictures and a few about scenes
    told in words), `text` (two rows without picture for each train scene), `mixed` (the first two and a twenty-fourth
    of the third) and `val` and `test` (one question a row, with its kind as `type`). No scene is in two splits; those
    told in words are of the split `text`.

    There are `scenes` (1 or more) train scenes, `test_questions` (2 or more) rows in `test` and half as many in `val`.
    `noise` is the share of wrong answers in `instruct`, so in `mixed`; `seed` is 0 or more; `workers` draw in parallel,
    to the same bytes; `progress` is called with (scenes done, scenes in all) now and then, all splits together. Raises
    UserError, with nothing written, for a folder that is not empty or a number that is too small.
    """
    numbers = {"scenes": (scenes, 1), "seed": (seed, 0), "test_questions": (test_questions, 2), "workers": (workers, 1)}
    for name, (got, least) in numbers.items():
        if got < least:
            raise UserError(f"got {name}={got}, expected at least {least}; raise {name}")
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"got {directory}, expected a new or empty folder; choose another or empty it")
    if not 0 <= noise < 1:
        raise UserError(f"got noise={noise}, expected a share from 0 to below 1; change noise")
    images = directory / "images"
    images.mkdir(parents=True)
    exams = {"val": range(test_questions // 2), "test": range(test_questions)}
    sizes = {"train": scenes, "text": 2 * scenes}
    sizes |= {split: -(-len(questions) // _EXAM_QUESTIONS) for split, questions in exams.items()}
    places = [(split, index) for split, size in sizes.items() for index in range(size)]
    work = partial(_work, images, seed, noise, exams)
    rows: dict[str, list[str]] = {file: [] for file in ("pretrain", "instruct", "text", "mixed", "val", "test")}
    # Not forked: the caller may hold threads, as everyone does who has imported torch.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext()
    with pool as workforce:
        drawn = workforce.map(work, places, chunksize=_CHUNK) if workforce else map(work, places)
        for done, ((split, index), made) in enumerate(zip(places, drawn, strict=True), start=1):
            for file, row in made:
                rows[file].append(row)
            if progress is not None and ((index + 1) % _CHUNK == 0 or index + 1 == sizes[split]):
                progress(done, len(places))
    # A scene's rows were made one after another, which would put them into one batch.
    np.random.default_rng((seed, _SHUFFLE)).shuffle(rows["instruct"])
    rows["mixed"] = [*rows["pretrain"], *rows["instruct"], *rows["text"][::24]]
    np.random.default_rng((seed, _SHUFFLE + 1)).shuffle(rows["mixed"])
    for file, lines in rows.items():
        (directory / f"{file}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")
    pictures = len(places) - sizes["text"]
    return WorldSummary(directory=directory, pictures=pictures, rows={file: len(lines) for file, lines in rows.items()})
