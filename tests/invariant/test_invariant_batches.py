"""Through the command line: how rows are dealt out changes no loss, no gradient norm and no weight."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from llavakd.config import parse_recipe as load_tree
from llavakd.data.pictures import load_pixels
from llavakd.models.student import build_student, load_student, save_model, vision_features

PARTS = ("loss", "ce", "response_kl", "visual_kl", "relation", "grad_norm", "lr")


def dft_on_mixed_rows(tiny, **changes):
    """One distilled stage on rows with no, one and two pictures, shuffled among each other."""
    tree = tiny.tree()
    (stage,) = tree["stages"] = tree["stages"][2:]
    stage |= {"data": "mixed", "grouping": "none", "epochs": 2, "learning_rate": 3.0e-4} | changes
    return tree


@pytest.fixture
def train(tiny, command, tmp_path):
    """Train a recipe and return its metrics by step and its final tensors."""

    def train(name, tree):
        done = command("train", tiny.recipe(tmp_path / f"{name}.yaml", tree), "--out", tmp_path / name)
        assert done.code == 0, done.err
        (stage,) = (stage["name"] for stage in tree["stages"])
        lines = [json.loads(line) for line in (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()]
        weights = load_student(str(tmp_path / name / stage / "model")).model.state_dict()
        return lines, weights, done.err

    return train


def assert_same_training(left, right):
    (lines, weights, _), (other_lines, other_weights, _) = left, right
    assert len(lines) == len(other_lines) > 3
    for line, other in zip(lines, other_lines, strict=True):
        values, others = ([entry[part] for part in PARTS if part in line] for entry in (line, other))
        assert values == pytest.approx(others, rel=2e-5, abs=1e-7), line["step"]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, other_weights[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def differs(left, right) -> bool:
    return any(not torch.allclose(left[1][name], right[1][name], atol=1e-5) for name in left[1])


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_eight_accumulated_rows_equal_eight_rows_at_once(tiny, train, reduction):
    whole = train("whole", dft_on_mixed_rows(tiny, reduction=reduction))
    for micro in (1, 4):
        split = train(f"split{micro}", dft_on_mixed_rows(tiny, reduction=reduction, micro_batch_size=micro))
        assert f"{micro} rows x {8 // micro} accumulated" in split[2]
        assert_same_training(whole, split)


@pytest.mark.parametrize("reduction", ["sample", "token"])
def test_packed_rows_equal_padded_ones(tiny, train, reduction):
    """Through files, workers and the command line; a pack is no longer than it may be."""
    tree = dft_on_mixed_rows(tiny, reduction=reduction)
    tree["data"]["mixed"]["max_length"] = 200
    whole = train("padded", tree)
    tree["stages"][0]["max_tokens_per_batch"] = 200
    packed = train("packed", tree | {"workers": 2})
    assert "1 processes x 8 rows in packs of up to 200 tokens" in packed[2]
    assert_same_training(whole, packed)
    cached = train("cached", tree | {"cache_features": True})
    assert_same_training(whole, cached)


def test_the_two_reductions_are_not_the_same_training(tiny, train):
    """Otherwise the equalities above would say less than they seem to."""
    sample, token = (train(name, dft_on_mixed_rows(tiny, reduction=name)) for name in ("sample", "token"))
    assert sample[0][0]["ce"] != pytest.approx(token[0][0]["ce"], rel=1e-3)
    assert differs(sample, token)


def test_cached_features_give_the_same_training_as_pixels(tiny, train):
    tree = dft_on_mixed_rows(tiny)
    pixels, cached = train("pixels", tree), train("cached", tree | {"cache_features": True})
    assert "encode pictures" in cached[2]
    assert_same_training(pixels, cached)


def test_reading_ahead_in_other_processes_changes_no_bit(tiny, train):
    tree = dft_on_mixed_rows(tiny)
    here, ahead = train("here", tree), train("ahead", tree | {"workers": 2})
    assert all(torch.equal(tensor, ahead[1][name]) for name, tensor in here[1].items())


def test_a_tower_that_differs_where_nobody_looks_is_run_twice_and_gives_the_same_training(tiny, train, tmp_path):
    """The last norm never reaches the features: towers unequal by it are run apart, and see the same."""
    other = load_student(str(tiny.teacher))
    with torch.no_grad():
        other.parts()["vision_tower"].post_layernorm.bias += 1
    save_model(other, tmp_path / "other", template="chatml")
    tree = dft_on_mixed_rows(tiny)
    shared = train("shared", tree)
    tree["student"]["vision_tower"] = str(tmp_path / "other")
    apart = train("apart", tree)
    assert "shared, run once" in shared[2]
    assert "each model runs its own" in apart[2]
    for lines in (shared, apart):
        lines[1].pop("model.vision_tower.post_layernorm.bias")
    assert_same_training(shared, apart)


def test_a_student_with_another_tower_than_the_teachers_trains_otherwise(tiny, train):
    tree = dft_on_mixed_rows(tiny)
    shared = train("shared", tree)
    tree["student"] |= {"vision_tower": str(tiny.tower), "from_scratch": ["vision_tower", "language_model"]}
    own = train("own", tree)
    assert "each model runs its own" in own[2]
    assert differs(own, shared)
    tower = {name: tensor for name, tensor in own[1].items() if ".vision_tower." in name}
    start = build_student(load_tree(tree).student, seed=1234).model.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in tower.items())


def test_features_are_kept_whole_and_each_under_the_name_of_its_picture(tiny, train, tmp_path):
    images, name = tmp_path / "images", "folder/é b.png"
    shutil.copytree(tiny.world / "images", images)
    rows = json.loads(tiny.mixed.read_text(encoding="utf-8"))
    (images / "folder").mkdir()
    (images / rows[0]["image"]).rename(images / name)
    old = rows[0]["image"]
    for row in rows:
        pictures = row.get("image")
        row["image"] = [
            name if one == old else one for one in ([pictures] if isinstance(pictures, str) else pictures or [])
        ]
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    tree = dft_on_mixed_rows(tiny) | {"cache_features": True}
    tree["data"]["mixed"] |= {"path": str(tmp_path / "rows.json"), "images": str(images)}
    train("cached", tree)
    (file,) = (tmp_path / "cached" / "features").iterdir()
    assert file.suffix == ".safetensors", "nothing half-written stays"
    held, recipe = load_file(file), load_tree(tree)
    assert set(held) == {one for row in rows for one in row["image"]} >= {name}
    student = build_student(recipe.student, seed=recipe.seed)
    for one in (name, *sorted(held)[:3]):
        pixels = load_pixels(recipe.data["mixed"], [one], student.image_processor)
        with torch.no_grad():
            torch.testing.assert_close(held[one], vision_features(student.model, pixels)[0], rtol=1e-4, atol=1e-5)


def test_cached_features_are_refused_where_the_teacher_needs_pixels(tiny, command, tmp_path):
    tree = dft_on_mixed_rows(tiny) | {"cache_features": True}
    tree["student"] |= {"vision_tower": str(tiny.tower), "from_scratch": ["vision_tower", "language_model"]}
    refused = command("train", tiny.recipe(tmp_path / "r.yaml", tree), "--out", tmp_path / "run")
    assert refused.code == 1
    assert "cache_features: stage dft needs pixels" in refused.err
    assert "Traceback" not in refused.err


def test_a_learning_tower_learns_and_the_teacher_keeps_its_own(tiny, train):
    tree = dft_on_mixed_rows(tiny, train=["vision_tower", "projector", "language_model"])
    whole = train("whole", tree)
    tree["stages"][0]["micro_batch_size"] = 2
    split = train("split", tree)
    start = load_student(str(tiny.teacher)).model.state_dict()
    moved = {n for n, t in whole[1].items() if ".vision_tower." in n and not torch.equal(t, start[n])}
    assert {
        f"model.vision_tower.{name}.weight" for name in ("embeddings.patch_embedding", "encoder.layers.0.mlp.fc1")
    } <= moved
    assert not any("layers.1." in name for name in moved)  # past the selected layer
    for weights in (whole[1], split[1]):  # softmax ignores it, so its gradient is rounding, which Adam makes a step of
        weights.pop("model.vision_tower.encoder.layers.0.self_attn.k_proj.bias")
    assert_same_training(whole, split)
