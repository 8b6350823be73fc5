"""Write a Shapes world to a folder that any reader of LLaVA data can read."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from llavakd.config import WorldConfig, checked
from llavakd.errors import UserError
from llavakd.progress import bar
from llavakd.shapes.questions import KINDS, Question, ask, ask_several, mistaken
from llavakd.shapes.scenes import SPLITS, WORLD, Scene, caption, draw, scene_in

_MIX = WORLD["rows"]
_COMPRESS = 1  # Noise hardly packs, so more effort buys nothing.
_CHUNK = 250  # Scenes that a worker draws at a time.
_SHUFFLE = len(SPLITS)  # Seeds the order of rows (two of them), apart from all splits.
_SLIPS = _SHUFFLE + 2  # Seeds the wrong answers: everything else is the same with and without them.
Row = tuple[str, str]  # file, and the row as a line of JSON, several times smaller than objects to hand back


def _row(name: str, talk: Sequence[Question], *, image: str = "", told: str = "", kind: str = "") -> str:
    """A LLaVA row about a picture, or about a scene that is `told` in words."""
    turns = [{"from": who, "value": said} for one in talk for who, said in (("human", one.text), ("gpt", one.answer))]
    turns[0]["value"] = (f"scene: {told} " if told else "<image>\n") + talk[0].text
    row = {"id": name, "image": image, "conversations": turns, "type": kind}
    return json.dumps({key: value for key, value in row.items() if value})


def _described(scene: Scene, rng: np.random.Generator) -> list[Question]:
    return [Question("describe", "describe the picture.", caption(scene, rng))]


def _train_rows(image: Path, noise: float, rng: np.random.Generator, slips: np.random.Generator) -> Iterator[Row]:
    def answered(scene: Scene, count: int) -> list[Question]:
        asked = ask_several(scene, count, rng)
        return [mistaken(question, slips) if slips.random() < noise else question for question in asked]

    scene = scene_in("train", rng)
    draw(scene, rng).save(image, compress_level=_COMPRESS)
    together = rng.random() < _MIX["many_turns"]
    asked = answered(scene, int(rng.integers(3, 6)) if together else 2)
    for number, talk in enumerate([asked] if together else [[question] for question in asked]):
        yield "instruct", _row(f"{image.stem}-{number}", talk, image=image.name)
    if rng.random() < _MIX["text_only"]:
        other = scene_in("text", rng)
        yield "instruct", _row(f"{image.stem}-text", answered(other, 1), told=caption(other, rng))
    yield "pretrain", _row(image.stem, _described(scene, rng), image=image.name)


def _rows(images: Path, world: WorldConfig, exams: dict[str, int], place: tuple[str, int]) -> list[Row]:
    """The rows of scene `index` of a split, its picture written; `exams` counts the questions of val and test."""
    split, index = place
    rng = np.random.default_rng((world.seed, SPLITS.index(split), index))
    if split == "text":
        scene = scene_in("text", rng)
        retold = rng.random() < _MIX["retold"]  # in another order than it was told, so that every thing is looked up
        talk = _described(scene, rng) if retold else ask_several(scene, int(rng.integers(4, 7)), rng)
        return [("text", _row(f"text-{index:06d}", talk, told=caption(scene, rng)))]
    if split == "train":
        slips = np.random.default_rng((world.seed, _SLIPS, index))
        return list(_train_rows(images / f"{index:06d}.png", world.noise, rng, slips))
    # Kinds go round over all questions of the split; scenes are drawn until one allows all kinds that are due.
    numbers = range(exams[split])[index * _MIX["exam_questions"] :][: _MIX["exam_questions"]]
    due = [list(KINDS)[number % len(KINDS)] for number in numbers]
    questions: list[Question] = []
    while len(questions) < len(due):
        scene = scene_in(split, rng)
        questions = [question for kind in due if (question := ask(scene, kind, rng))]
    name = f"{split}-{index:06d}"
    draw(scene, rng).save(images / f"{name}.png", compress_level=_COMPRESS)
    return [(split, _row(f"{name}-{n}", [one], image=f"{name}.png", kind=one.kind)) for n, one in enumerate(questions)]


def examples(count: int) -> list[tuple[Image.Image, Question]]:
    """The same few pictures of the test split every time, each with a question."""
    rng = np.random.default_rng(0)
    scenes = (scene_in("test", rng) for _ in range(count))
    return [(draw(scene, rng), ask_several(scene, 1, rng)[0]) for scene in scenes]


def write_world(directory: Path, world: WorldConfig, *, workers: int = 1) -> tuple[int, dict[str, int]]:
    """Write pictures and conversations of a Shapes world, with a bar; however many `workers` draw, the same bytes.

    The folder, new or empty, gets `images/` with `scenes` train pictures and others, and the lists of LLaVA rows that
    world.yaml names as `files`; `image` is relative to `images/`, `test` has `test_questions` rows. No scene is in two
    splits; those told in words are of the split `text`. `noise` is the share of wrong answers in `instruct`, so in
    `mixed`. Returns how many pictures and how many rows of each list were written. Raises UserError, with nothing
    written, where the folder is not empty or a number of `world` is out of its range.
    """
    checked(WorldConfig, vars(world))
    if workers < 1:
        raise UserError(f"got workers={workers}, expected at least 1; raise workers")
    # Not forked: the caller may hold threads, as everyone does who has imported torch.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers != 1 else nullcontext()
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise UserError(f"got {directory}, expected a new or empty folder; choose another or empty it")
    images, exams = directory / "images", {"val": world.test_questions // 2, "test": world.test_questions}
    images.mkdir(parents=True)
    sizes = {name: -(-questions // _MIX["exam_questions"]) for name, questions in exams.items()}
    sizes = {"train": world.scenes, "text": 2 * world.scenes} | sizes
    places = [(split, index) for split, size in sizes.items() for index in range(size)]
    rows: dict[str, list[str]] = {file: [] for file in WORLD["files"]}
    with pool as workforce, bar("draw", len(places)) as advance:
        work = partial(workforce.map, chunksize=_CHUNK) if workforce else map
        for done, found in enumerate(work(partial(_rows, images, world, exams), places), start=1):
            for file, row in found:
                rows[file].append(row)
            advance(done)
    # A scene's rows were made one after another, which would put them into one batch.
    np.random.default_rng((world.seed, _SHUFFLE)).shuffle(rows["instruct"])
    rows["mixed"] = [*rows["pretrain"], *rows["instruct"], *rows["text"][::24]]
    np.random.default_rng((world.seed, _SHUFFLE + 1)).shuffle(rows["mixed"])
    for file, lines in rows.items():
        (directory / f"{file}.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8", newline="\n")
    return len(places) - sizes["text"], {file: len(lines) for file, lines in rows.items()}
