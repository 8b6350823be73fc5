"""What two models must share to be compared position by position, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from llavakd.config import StudentConfig, TeacherConfig
from llavakd.models.alignment import AlignmentError, align
from llavakd.models.student import build_student, load_student, save_model
from llavakd.models.teacher import load_teacher


def student_of(tiny, **changes):
    """With the teacher's own tower, unless told otherwise."""
    parts = {"vision_tower": str(tiny.teacher), "language_model": str(tiny.language_model)}
    form = {"from_scratch": ("language_model",), "vision_feature_select_strategy": "full"}
    return build_student(StudentConfig(**(parts | form | changes)), seed=0)


@pytest.fixture(scope="module")
def teacher(tiny):
    return load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32"))


def copy_with(tiny, tmp_path: Path, file: str, change) -> str:
    """A copy of the tiny language model's folder with one JSON file changed in place."""
    folder = tmp_path / "changed"
    shutil.copytree(tiny.language_model, folder)
    tree = json.loads((folder / file).read_text(encoding="utf-8"))
    change(tree)
    (folder / file).write_text(json.dumps(tree), encoding="utf-8")
    return str(folder)


def test_a_teacher_is_frozen_and_in_eval_mode(teacher):
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tower_from_a_copy_of_the_folder_elsewhere_is_shared(tiny, tmp_path, dtype):
    shutil.copytree(tiny.teacher, tmp_path / "elsewhere")
    teacher = load_teacher(TeacherConfig(path=str(tiny.teacher), dtype=dtype))
    pair = align(student_of(tiny, vision_tower=str(tmp_path / "elsewhere")), teacher)
    assert pair.shared_tower
    assert "run once" in pair.note


def test_a_tower_with_one_changed_weight_is_not_shared(tiny, teacher, tmp_path):
    other = load_student(str(tiny.teacher))
    with torch.no_grad():
        other.parts()["vision_tower"].encoder.layers[1].mlp.fc2.weight[3, 5] += 1e-3
    save_model(other, tmp_path / "other", template="chatml")
    pair = align(student_of(tiny, vision_tower=str(tmp_path / "other")), teacher)
    assert not pair.shared_tower
    assert "each model runs its own" in pair.note


def test_one_tower_read_at_two_layers_is_not_shared(tiny, teacher):
    assert not align(student_of(tiny, vision_feature_layer=-1), teacher).shared_tower


def test_unequal_numbers_of_visual_tokens_are_refused_with_both_numbers(tiny, teacher):
    with pytest.raises(AlignmentError, match=r"student 15, teacher 16"):
        align(student_of(tiny, vision_feature_select_strategy="default"), teacher)


def test_different_tokenizers_are_refused_with_the_first_id_that_differs(tiny, teacher, tmp_path):
    names = {}

    def swap(tree):
        vocabulary = tree["model"]["vocab"]
        by_id = {index: token for token, index in vocabulary.items()}
        names.update({index: by_id[index] for index in (40, 41)})
        vocabulary[by_id[40]], vocabulary[by_id[41]] = 41, 40

    folder = copy_with(tiny, tmp_path, "tokenizer.json", swap)
    with pytest.raises(AlignmentError) as refusal:
        align(student_of(tiny, language_model=folder), teacher)
    assert f"id 40 is {names[41]!r} for the student and {names[40]!r} for the teacher" in str(refusal.value)


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_padded_heads_of_unequal_width_share_the_ids_of_the_tokenizer(tiny, teacher, tmp_path, wider):
    ids = len(teacher.tokenizer)
    assert ids + 9 < len(teacher.head)
    rows = len(teacher.head) + 64 if wider == "student" else ids + 9
    folder = copy_with(tiny, tmp_path, "config.json", lambda tree: tree.update(vocab_size=rows))
    student = student_of(tiny, language_model=folder)
    assert len(student.head) == rows
    assert align(student, teacher).vocab_size == ids == len(student.tokenizer)


def test_the_picture_mark_may_have_another_id_or_none(tiny, teacher, tmp_path):
    """A student whose tokenizer has no picture mark gets one after all others; the ids before it are shared."""

    def rename(tree):
        for token in tree["added_tokens"]:
            if token["content"] == "<image>":
                token["content"] = "<|spare|>"
        tree["model"]["vocab"]["<|spare|>"] = tree["model"]["vocab"].pop("<image>")

    folder = copy_with(tiny, tmp_path, "tokenizer.json", rename)
    settings = Path(folder) / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<image>", "<|spare|>"))
    student = student_of(tiny, language_model=folder)
    assert student.image_token_id != teacher.image_token_id
    assert align(student, teacher).vocab_size == len(teacher.tokenizer)


@pytest.mark.parametrize(
    ("key", "value"), [("image_mean", [0.4, 0.5, 0.5]), ("resample", 2), ("do_normalize", False), ("rescale_factor", 1)]
)
def test_unequal_image_processors_are_refused_by_the_key_that_differs(tiny, teacher, tmp_path, key, value):
    shutil.copytree(tiny.teacher, tmp_path / "tower")
    file = tmp_path / "tower" / "processor_config.json"
    tree = json.loads(file.read_text())
    assert tree["image_processor"].get(key) != value
    tree["image_processor"][key] = value
    file.write_text(json.dumps(tree))
    with pytest.raises(AlignmentError, match=f"differ in {key}: "):
        align(student_of(tiny, vision_tower=str(tmp_path / "tower")), teacher)
