"""Write a Shapes world to a folder that any reader of LLaVA data can read."""

import json
from collections.abc import Callable, Sequence
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

DESCRIBE = "describe the picture."
IMAGE_TAG = "<image>\n"

_EXAM_QUESTIONS = 3  # Questions about each picture of val and test.
_MANY_TURNS = 0.6  # Share of train scenes asked about in one long conversation rather than two short ones.
_TEXT_ONLY = 0.09  # Rows without a picture for each train scene; with 1.4 rows that have one, about 6 % of all.
_RETOLD = 1 / 3  # Share of text rows that tell the scene once more.
_COMPRESS = 1  # Noise hardly packs, so more effort buys nothing.
_CHUNK = 250  # Scenes that a worker draws, and that progress goes on, at a time.
_SHUFFLE = len(SPLITS)  # Seeds the order of rows (two of them), apart from all splits.
_SLIPS = _SHUFFLE + 2  # Seeds the wrong answers: everything else is the same with and without them.

Rows = dict[str, list[str]]  # by file, each row a line of JSON, several times smaller than objects to hand back
Turns = list[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class WorldSummary:
    """What was written: the number of pictures over all splits, and of rows by JSON file (without `.json`)."""

    directory: Path
    pictures: int
    rows: dict[str, int]


def _row(name: str, turns: Turns, *, image: str | None = None, kind: str | None = None) -> str:
    values = [value for turn in turns for value in turn]
    if image is not None:
        values[0] = IMAGE_TAG + values[0]
    conversations = [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]
    row = {"id": name, "image": image, "conversations": conversations, "type": kind}
    return json.dumps({key: value for key, value in row.items() if value is not None})


def _turns(questions: Sequence[Question]) -> Turns:
    return [(question.text, question.answer) for question in questions]


def _tell(scene: Scene, turns: Turns, rng: np.random.Generator) -> Turns:
    """The scene in words before the first turn, in place of a picture."""
    return [(f"scene: {caption(scene, rng)} {turns[0][0]}", turns[0][1]), *turns[1:]]


def _train_scene(images: Path, index: int, rng: np.random.Generator, noise: float, slips: np.random.Generator) -> Rows:
    def answered(scene: Scene, count: int) -> Turns:
        asked = ask_several(scene, count, rng)
        return _turns([mistaken(question, slips) if slips.random() < noise else question for question in asked])

    scene = scene_in("train", rng)
    name, image = f"{index:06d}", f"{index:06d}.png"
    draw(scene, rng).save(images / image, compress_level=_COMPRESS)
    if rng.random() < _MANY_TURNS:
        conversations = [answered(scene, int(rng.integers(3, 6)))]
    else:
        conversations = [[turn] for turn in answered(scene, 2)]
    instruct = [_row(f"{name}-{number}", turns, image=image) for number, turns in enumerate(conversations)]
    if rng.random() < _TEXT_ONLY:
        told = scene_in("text", rng)
        instruct.append(_row(f"{name}-text", _tell(told, answered(told, 1), rng)))
    return {"pretrain": [_row(name, [(DESCRIBE, caption(scene, rng))], image=image)], "instruct": instruct}


def _text_scene(index: int, rng: np.random.Generator) -> Rows:
    scene = scene_in("text", rng)
    if rng.random() < _RETOLD:
        turns = [(DESCRIBE, caption(scene, rng))]  # in another order than it was told: every thing is looked up
    else:
        turns = _turns(ask_several(scene, 1 + int(rng.integers(3, 6)), rng))
    return {"text": [_row(f"text-{index:06d}", _tell(scene, turns, rng))]}


def _exam_scene(images: Path, split: str, index: int, total: int, rng: np.random.Generator) -> Rows:
    """Kinds go round over all questions of the split; scenes are drawn until one allows all three that are due."""
    numbers = range(index * _EXAM_QUESTIONS, min((index + 1) * _EXAM_QUESTIONS, total))
    kinds = [list(KINDS)[number % len(KINDS)] for number in numbers]
    questions: list[Question] = []
    while len(questions) < len(kinds):
        scene = scene_in(split, rng)
        questions = [found for kind in kinds if (found := ask(scene, kind, rng)) is not None]
    name = f"{split}-{index:06d}"
    draw(scene, rng).save(images / f"{name}.png", compress_level=_COMPRESS)
    rows = [
        _row(f"{name}-{number}", _turns([question]), image=f"{name}.png", kind=question.kind)
        for number, question in enumerate(questions)
    ]
    return {split: rows}


def _work(images: Path, seed: int, exams: dict[str, int], noise: float, place: tuple[str, int]) -> Rows:
    """Draw scene `index` of a split; `exams` holds how many questions val and test have."""
    split, index = place
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    if split == "train":
        return _train_scene(images, index, rng, noise, np.random.default_rng((seed, _SLIPS, index)))
    if split == "text":
        return _text_scene(index, rng)
    return _exam_scene(images, split, index, exams[split], rng)


def examples(count: int) -> list[tuple[Image.Image, Question]]:
    """The same few pictures of the test split every time, each with a question."""
    rng = np.random.default_rng(0)
    scenes = (scene_in("test", rng) for _ in range(count))
    return [(draw(scene, rng), ask_several(scene, 1, rng)[0]) for scene in scenes]


def _shuffled(lines: Sequence[str], *seeds: int) -> list[str]:
    return [lines[place] for place in np.random.default_rng(seeds).permutation(len(lines))]


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
    to the same bytes; `progress` is called with (scenes done, scenes in all) now and then, all splits together.

    Raises:
        UserError: the directory is not an empty folder or a number is too small; nothing is written then.
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
    exams = {"val": test_questions // 2, "test": test_questions}
    sizes = {"train": scenes, "text": 2 * scenes} | {name: -(-n // _EXAM_QUESTIONS) for name, n in exams.items()}
    places = [(split, index) for split, size in sizes.items() for index in range(size)]
    work = partial(_work, images, seed, exams, noise)
    rows: Rows = {file: [] for file in ("pretrain", "instruct", "text", "mixed", "val", "test")}
    # Not forked: the caller may hold threads, as everyone does who has imported torch.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else nullcontext()
    with pool as workforce:
        drawn = workforce.map(work, places, chunksize=_CHUNK) if workforce else map(work, places)
        for done, ((split, index), made) in enumerate(zip(places, drawn, strict=True), start=1):
            for file, lines in made.items():
                rows[file] += lines
            if progress is not None and ((index + 1) % _CHUNK == 0 or index + 1 == sizes[split]):
                progress(done, len(places))
    # A scene's rows were made one after another, which would put them into one batch.
    rows["instruct"] = _shuffled(rows["instruct"], seed, _SHUFFLE)
    rows["mixed"] = _shuffled([*rows["pretrain"], *rows["instruct"], *rows["text"][::24]], seed, _SHUFFLE + 1)
    for file, lines in rows.items():
        (directory / f"{file}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")
    pictures = len(places) - sizes["text"]
    return WorldSummary(directory=directory, pictures=pictures, rows={file: len(lines) for file, lines in rows.items()})
