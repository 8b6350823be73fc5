"""A written world is valid LLaVA data, repeatable, and its pictures show what its words say."""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from shapes_oracle import answer_of

from llavakd.config import WorldConfig
from llavakd.shapes.questions import KINDS
from llavakd.shapes.scenes import (
    COLORS,
    GROUND,
    PLACES,
    RGB,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    draw,
    mask,
    random_scene,
    split_of,
)
from llavakd.shapes.world import write_world

SCENES, QUESTIONS = 400, 300
Row = dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shapes") / "world"
    pictures, rows = write_world(directory, WorldConfig(scenes=SCENES, seed=7, test_questions=QUESTIONS))
    assert pictures == len(list((directory / "images").iterdir()))
    assert rows == {path.stem: len(rows_of(directory, path.stem)) for path in directory.glob("*.json")}
    return directory


def rows_of(world: Path, name: str) -> list[Row]:
    rows: list[Row] = json.loads((world / f"{name}.json").read_text())
    return rows


def pairs_of(row: Row) -> list[tuple[str, str]]:
    values = [turn["value"] for turn in row["conversations"]]
    return [(values[at].removeprefix("<image>\n"), values[at + 1]) for at in range(0, len(values), 2)]


def scene_from(words: str) -> Scene:
    """Read a caption back, in whatever order it names the things."""
    parts = [part.rsplit(" ", 3) for part in words.removesuffix(".").split(", ")]
    things = [Thing(shape=s, color=c, size=z, cell=PLACES.index(p)) for p, z, c, s in parts]
    return Scene(things=tuple(sorted(things, key=lambda thing: thing.cell)))


def told_in(text: str) -> tuple[Scene, str]:
    """The scene and the question of ``scene: ... . question?`` or ``scene: ... . describe the picture.``."""
    found = re.fullmatch(r"scene: ([^.]+\.) ([^.]+[?.])", text)
    assert found, text
    return scene_from(found[1]), found[2]


def templates() -> tuple[list[tuple[str, str]], NDArray[np.float32]]:
    """Every shape and size at every jitter, as the 16x16 pixels of a cell."""
    names, cells = [], []
    for shape in SHAPES:
        for size in SIZES:
            pixels = mask(shape, size)
            for down in range(-2, 3):
                for along in range(-2, 3):
                    top, left = (16 - len(pixels)) // 2 + down, (16 - len(pixels)) // 2 + along
                    cell = np.zeros((16, 16), np.float32)
                    cell[top : top + len(pixels), left : left + len(pixels)] = pixels
                    names.append((shape, size))
                    cells.append(cell)
    return names, np.stack(cells).reshape(len(cells), -1)


NAMES, TEMPLATES = templates()


def seen_in(picture: Image.Image) -> Scene:
    """Read a picture by its pixels alone."""
    assert picture.size == (48, 48)
    assert picture.mode == "RGB"
    pixels = np.asarray(picture).astype(np.float32)
    palette = np.array(list(RGB.values()), np.float32)
    things = []
    for cell in range(9):
        row, column = cell // 3 * 16, cell % 3 * 16
        window = pixels[row : row + 16, column : column + 16].reshape(-1, 3)
        shown = np.linalg.norm(window - GROUND, axis=1) > 75
        if shown.sum() < 5:
            continue
        mean = np.median(window[shown], axis=0)
        color = list(RGB)[int(np.argmin(np.linalg.norm(palette - mean, axis=1)))]
        shape, size = NAMES[int(np.argmin(np.abs(TEMPLATES - shown.astype(np.float32)).sum(axis=1)))]
        things.append(Thing(shape=shape, color=color, size=size, cell=cell))
    return Scene(things=tuple(things))


def test_pictures_show_their_scene_in_plain_sight() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        scene = random_scene(rng)
        assert caption(seen_in(draw(scene, rng))) == caption(scene)


def test_ground_is_gray_with_the_stated_noise_and_things_move() -> None:
    rng = np.random.default_rng(1)
    scene = scene_from("northwest big red square, southeast small blue ring.")
    pictures = np.stack([np.asarray(draw(scene, rng)) for _ in range(50)]).astype(np.float64)
    empty = pictures[:, 16:32, 16:32]
    assert empty.mean() == pytest.approx(128, abs=0.5)
    assert empty.std() / 255 == pytest.approx(0.05, abs=0.002)
    red = pictures[:, :16, :16, 0] - pictures[:, :16, :16, 1] > 80
    tops = {int(picture.any(axis=1).argmax()) for picture in red}
    assert tops == {0, 1, 2, 3, 4}


def test_every_row_is_a_llava_row(world: Path) -> None:
    pictures = {path.name for path in (world / "images").iterdir()}
    used = set()
    for name in ("pretrain", "instruct", "text", "mixed", "val", "test"):
        rows = rows_of(world, name)
        assert len({row["id"] for row in rows}) == len(rows)
        for row in rows:
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(set(turn) == {"from", "value"} for turn in turns)
            assert turns[0]["value"].startswith("<image>\n") == ("image" in row)
            text = " ".join(turn["value"] for turn in turns).replace("<image>\n", "", 1)
            assert re.fullmatch(r"[a-z:,.?]+( [a-z:,.?]+)*", text), text
            assert set(row) - {"image", "type"} == {"id", "conversations"}
            assert ("type" in row) == (name in ("val", "test"))
            used |= {row["image"]} if "image" in row else set()
    assert used == pictures


def test_captions_and_answers_about_train_pictures_are_true(world: Path) -> None:
    scenes, shuffled = {}, 0
    for row in rows_of(world, "pretrain"):
        ((request, words),) = pairs_of(row)
        assert request == "describe the picture."
        scenes[row["image"]] = scene_from(words)
        shown = seen_in(Image.open(world / "images" / row["image"]))
        assert scenes[row["image"]] == shown
        shuffled += words != caption(shown)
    assert len(scenes) == SCENES
    assert 0.6 < shuffled / SCENES < 0.95, "captions are not in random order"
    assert len({caption(scene) for scene in scenes.values()}) > 0.98 * SCENES, "scenes repeat"
    for row in rows_of(world, "instruct"):
        if "image" in row:
            assert all(answer_of(scenes[row["image"]], text) == answer for text, answer in pairs_of(row))


def test_instruct_has_the_stated_mix(world: Path) -> None:
    rows = rows_of(world, "instruct")
    turns: dict[str, list[int]] = {}
    for row in rows:
        if "image" in row:
            turns.setdefault(row["image"], []).append(len(pairs_of(row)))
    assert len(turns) == SCENES
    forms = Counter(tuple(lengths) for lengths in turns.values())
    assert set(forms) == {(1, 1), (3,), (4,), (5,)}
    assert 0.32 < forms[1, 1] / SCENES < 0.48
    assert 0.03 < sum("image" not in row for row in rows) / len(rows) < 0.09
    neighbours = sum(one.get("image", 0) == other.get("image", 1) for one, other in pairwise(rows))
    assert neighbours < 5, "rows about one scene stand side by side"


def test_told_scenes_are_answered_truly(world: Path) -> None:
    retold = other_order = 0
    texts = rows_of(world, "text")
    told = [row for row in rows_of(world, "instruct") if "image" not in row]
    assert len(texts) == 2 * SCENES
    for row in [*texts, *told]:
        (first, answer), *further = pairs_of(row)
        scene, question = told_in(first)
        assert split_of(scene) == "text"
        if question == "describe the picture.":
            assert not further
            assert scene_from(answer) == scene
            retold += 1
            other_order += f"scene: {answer} " not in first
            continue
        questions = [(question, answer), *further]
        assert len(dict(questions)) == len(questions)
        assert all(answer_of(scene, text) == answer for text, answer in questions)
        assert len(questions) in ((4, 5, 6) if row in texts else (1,))
    assert 0.27 < retold / len(texts) < 0.4
    assert 0.6 < other_order / retold < 0.95


@pytest.mark.parametrize(("name", "count"), [("test", QUESTIONS), ("val", QUESTIONS // 2)])
def test_exams_are_true_and_even_over_kinds(world: Path, name: str, count: int) -> None:
    rows = rows_of(world, name)
    assert Counter(row["type"] for row in rows) == dict.fromkeys(KINDS, count // len(KINDS))
    assert len({row["image"] for row in rows}) == count // 3
    for row in rows:
        ((text, answer),) = pairs_of(row)
        assert answer_of(seen_in(Image.open(world / "images" / row["image"])), text) == answer


def test_no_scene_is_in_two_splits(world: Path) -> None:
    seen: dict[str, set[str]] = {"train": set(), "val": set(), "test": set(), "text": set()}
    for path in (world / "images").iterdir():
        split = path.stem.split("-")[0] if "-" in path.stem else "train"
        seen[split].add(caption(seen_in(Image.open(path))))
    for row in [*rows_of(world, "text"), *(row for row in rows_of(world, "instruct") if "image" not in row)]:
        request, _ = pairs_of(row)[0]
        seen["text"].add(caption(told_in(request)[0]))
    assert all(len(captions) >= 50 for captions in seen.values())
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))


def test_the_mixture_holds_what_it_says_in_another_order(world: Path) -> None:
    rows = {name: rows_of(world, name) for name in ("pretrain", "instruct", "text", "mixed")}
    made_of = [*rows["pretrain"], *rows["instruct"], *rows["text"][::24]]
    assert sorted(map(json.dumps, rows["mixed"])) == sorted(map(json.dumps, made_of))
    assert rows["mixed"][:50] != made_of[:50]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_seed_decides_every_byte_however_many_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    shown: list[tuple[str, int]] = []

    @contextmanager
    def bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
        shown.append((label, total))
        yield calls.append

    monkeypatch.setattr("llavakd.shapes.world.bar", bar)
    for name, seed, workers in (("one", 5, 1), ("two", 5, 2), ("other", 6, 1)):
        write_world(tmp_path / name, WorldConfig(scenes=270, seed=seed, test_questions=20), workers=workers)
    one = contents(tmp_path / "one")
    assert len(one) == 270 + 4 + 7 + 6
    assert one == contents(tmp_path / "two")
    other = contents(tmp_path / "other")
    assert other.keys() == one.keys()
    assert all(other[name] != data for name, data in one.items())
    total = 270 + 540 + 4 + 7
    assert shown == [("draw", total)] * 3
    assert calls == [*range(1, total + 1)] * 3


def test_noise_makes_that_share_of_answers_wrong_and_nothing_else(world: Path, tmp_path: Path) -> None:
    write_world(noisy := tmp_path / "noisy", WorldConfig(scenes=SCENES, seed=7, test_questions=QUESTIONS, noise=0.3))
    for name in ("pretrain", "text", "val", "test"):
        assert rows_of(noisy, name) == rows_of(world, name)
    told = zip(rows_of(world, "instruct"), rows_of(noisy, "instruct"), strict=True)
    pairs = [pair for one, other in told for pair in zip(pairs_of(one), pairs_of(other), strict=True)]
    assert all(right[0] == slip[0] for right, slip in pairs)
    wrong = [(right[1], slip[1]) for right, slip in pairs if right[1] != slip[1]]
    assert 0.25 < len(wrong) / len(pairs) < 0.35
    sorts = [{"yes", "no"}, set(SIZES), set(SHAPES), set(COLORS), {"zero", "one", "two", "three", "four"}]
    for right, slip in wrong:
        sort = next((sort for sort in sorts if right in sort), None)
        assert slip in sort if sort else slip == "nothing" or slip.split(" ")[1] in SHAPES
    assert len({slip for right, slip in wrong if right in COLORS}) == len(COLORS)


@pytest.mark.parametrize("noise", [-0.1, 1.0])
def test_a_noise_that_is_no_share_is_refused(tmp_path: Path, noise: float) -> None:
    with pytest.raises(ValueError, match=f"noise: got {noise}; input should be"):
        write_world(tmp_path / "new", WorldConfig(scenes=1, noise=noise))
    assert not (tmp_path / "new").exists()


def test_bad_places_and_numbers_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    for place in ("full", "full/precious.txt"):
        with pytest.raises(ValueError, match="expected a new or empty folder"):
            write_world(tmp_path / place, WorldConfig(scenes=1))
    assert contents(tmp_path) == {"full/precious.txt": b"keep"}
    good: dict[str, Any] = {"scenes": 1, "seed": 0, "test_questions": 2, "workers": 1}
    for name, least in good.items():
        workers = (wrong := {**good, name: least - 1}).pop("workers")
        told = f"{name}: got {least - 1}; " if name != "workers" else "got workers=0, expected at least 1"
        with pytest.raises(ValueError, match=told):
            write_world(tmp_path / "new", WorldConfig(**wrong), workers=workers)
    assert not (tmp_path / "new").exists()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert write_world(tmp_path, WorldConfig(scenes=1, test_questions=2))[1]["pretrain"] == 1
