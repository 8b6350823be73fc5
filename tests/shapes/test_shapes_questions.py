"""Questions are true by an oracle that reads their words, and their answers cannot be guessed."""

import re
from collections import Counter

import numpy as np
import pytest
from shapes_oracle import ORACLE, answer_of

from llavakd.shapes.questions import KINDS, ask, ask_several
from llavakd.shapes.scenes import SPLITS, Scene, Thing, caption, random_scene, scene_in, split_of

LIMITS = {"exists": 0.55, "size": 0.55, "bigger": 0.6, "compare": 0.55, "count": 0.35}
OPTIONS = {"count": 5, "shape": 5, "color": 6, "twostep": 6, "place": 31, "beside": 31}


def test_the_oracle_covers_every_kind() -> None:
    assert ORACLE.keys() == KINDS.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_true_and_no_answer_is_a_good_guess(kind: str) -> None:
    rng = np.random.default_rng(11)
    answers: Counter[str] = Counter()
    tried = 0
    while answers.total() < 3000:
        tried += 1
        scene = random_scene(rng)
        question = ask(scene, kind, rng)
        if question is None:
            continue
        form, solve = ORACLE[kind]
        found = re.fullmatch(form, question.text)
        assert found, question.text
        assert question.answer == solve(scene, found.groups()), f"{question} about {caption(scene)}"
        answers[question.answer] += 1
    most = answers.most_common(1)[0]
    assert most[1] / 3000 <= LIMITS.get(kind, 0.4), answers
    assert answers["nothing"] / 3000 <= 0.2, answers
    assert len(answers) == OPTIONS.get(kind, 2), answers
    assert tried < 6000 / 0.9, f"{kind} suits fewer than 45 % of scenes"


def test_several_questions_differ_and_mix_kinds() -> None:
    rng = np.random.default_rng(2)
    kinds = 0
    for _ in range(300):
        scene = random_scene(rng)
        questions = ask_several(scene, 6, rng)
        assert len({question.text for question in questions}) == 6
        assert all(question.answer == answer_of(scene, question.text) for question in questions)
        kinds += len({question.kind for question in questions})
    assert kinds / 300 > 5.8


def test_a_caption_tells_different_scenes_apart_and_reads_in_order() -> None:
    one = Thing(shape="circle", color="red", size="big", cell=0)
    other = Thing(shape="square", color="blue", size="small", cell=4)
    assert caption(Scene(things=(one, other))) == "northwest big red circle, center small blue square."
    rng = np.random.default_rng(3)
    scenes = {random_scene(rng) for _ in range(3000)}
    assert len({caption(scene) for scene in scenes}) == len(scenes)


def test_scenes_have_two_to_five_things_and_every_split_is_filled() -> None:
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng) for _ in range(2000)]
    counts = Counter(len(scene.things) for scene in scenes)
    assert set(counts) == {2, 3, 4, 5}
    assert min(counts.values()) > 400
    parts = Counter(split_of(scene) for scene in scenes)
    assert set(parts) == set(SPLITS)
    assert min(parts.values()) > 300
    assert all(split_of(scene_in(split, rng)) == split for split in SPLITS)


def test_nonsense_is_refused() -> None:
    rng = np.random.default_rng(0)
    thing = Thing(shape="circle", color="red", size="big", cell=0)
    with pytest.raises(AssertionError, match="got 'pink' in a Thing"):
        Thing(shape="circle", color="pink", size="big", cell=0)
    with pytest.raises(AssertionError, match=r"got things in cells \[0, 0\]"):
        Scene(things=(thing, thing))
    with pytest.raises(AssertionError, match="got question kind 'why'"):
        ask(random_scene(rng), "why", rng)
    with pytest.raises(AssertionError, match="got 11 questions"):
        ask_several(random_scene(rng), 11, rng)
    with pytest.raises(AssertionError, match="got split 'dev'"):
        scene_in("dev", rng)
