"""Through the command line: a teacher's cache says what the teacher says, trains alike, and is refused where it is stale."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llavakd import pipeline
from llavakd.config import TeacherConfig, load_recipe, parse_recipe
from llavakd.data.chat import Segment
from llavakd.data.collate import RowDataset, Source, collate
from llavakd.data.samples import load_samples
from llavakd.models.student import build_student, load_student, load_teacher
from llavakd.train.taught import rows_of

PARTS = ("loss", "ce", "response_kl", "visual_kl", "grad_norm", "truncated", "left_out")


def tree_of(tiny, cache: Path | None = None, **changes):
    """One distilling stage on rows with no, one and two pictures, without relation."""
    tree = tiny.tree()
    (stage,) = tree["stages"] = tree["stages"][2:]
    stage |= {"data": "mixed", "grouping": "none", "epochs": 2, "learning_rate": 3.0e-4}
    stage |= {"losses": {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0}} | changes
    if cache:
        tree["teacher"]["cache"] = str(cache)
    return tree


@pytest.fixture
def run(tiny, command, tmp_path):
    """Start a command on a recipe that is a tree, in a run folder of this name."""

    def run(verb, name, tree, *words):
        recipe = tiny.recipe(tmp_path / f"{verb}-{name}.yaml", tree)
        return command(verb, recipe, "--out", tmp_path / name, *words)

    return run


@pytest.fixture
def train(run, tmp_path):
    """Train; its metrics by step and its final tensors."""

    def train(name, tree):
        done = run("train", name, tree)
        assert done.code == 0, done.err
        lines = (tmp_path / name / "dft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [*map(json.loads, lines)], load_student(str(tmp_path / name / "dft" / "model")).model.state_dict()

    return train


def widest(tiny) -> int:
    return len(load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32")).tokenizer)


@pytest.mark.parametrize("changes", [{}, {"max_tokens_per_batch": 800}, {"micro_batch_size": 2, "reduction": "token"}])
def test_a_cache_of_all_that_the_teacher_says_trains_as_the_teacher_does(tiny, run, train, tmp_path, changes):
    done = run("cache", "cached", tree_of(tiny, tmp_path / "cache", **changes), "--visual-share", "1", "--top-k", "600")
    assert done.code == 0, done.err
    assert "cache dft: about" in done.err
    assert not (tmp_path / "cached" / "dft").exists(), "nothing is trained"
    lines, weights = train("cached", tree_of(tiny, tmp_path / "cache", **changes))
    others, there = train("there", tree_of(tiny, **changes))
    assert len(lines) == len(others) > 3
    for line, other in zip(lines, others, strict=True):
        assert [line[part] for part in PARTS] == pytest.approx([other[part] for part in PARTS], rel=2e-3), line["step"]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, there[name], rtol=1e-3, atol=2e-4)


def test_what_is_stored_is_what_stock_models_say_at_responses_and_at_the_share_of_visual_tokens(tiny, run, tmp_path):
    tree, share, k = tree_of(tiny, tmp_path / "cache"), 0.3, 5
    done = run("cache", "cached", tree, "--visual-share", str(share), "--top-k", str(k))
    assert done.code == 0, done.err
    folder = tmp_path / "cache" / "dft"
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert (index["top_k"], index["visual_share"]) == (k, share)
    (file,) = folder.glob("*.safetensors")
    held = load_file(file)
    ends = held["counts"].cumsum(0).tolist()
    spans = dict(zip(held["keys"].tolist(), zip([0, *ends], ends, strict=False), strict=True))
    teacher, recipe = load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32")), parse_recipe(tree)
    student, data = build_student(recipe.student, seed=0), recipe.data["mixed"]
    source = Source(samples=load_samples(data), renderer=student.renderer(data), data=data)
    rows = RowDataset([source], image_processor=student.image_processor)
    assert len(spans) == len(held["keys"]) == len(rows)
    drawn = set()
    for row in (rows[number] for number in range(len(rows))):
        batch = collate([row], pad_token_id=0)
        ((name, where, key),) = rows_of(batch)
        assert name == row.id
        assert where.tolist() == [*range(batch.labels.shape[1])]
        start, end = spans[key]
        places, visual, ids, logp, tail = (
            held[part][start:end] for part in ("places", "visual", "ids", "logp", "tail")
        )
        pictured = (batch.segments[0] == Segment.VISUAL).nonzero().squeeze(1)
        seen = places[visual]
        assert len(seen) == round(share * len(pictured))
        assert set(seen.tolist()) <= set(pictured.tolist())
        predicts = (batch.labels[0, 1:] != -100).nonzero().squeeze(1)
        assert set(places.tolist()) == set(seen.tolist()) | set(predicts.tolist())
        drawn.add(tuple((seen - pictured[0]).tolist()) if len(seen) else ())
        given = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
        with torch.no_grad():
            logits = teacher.model(**given).logits[0, places, : index["vocab_size"]].double()
        exact = logits.log_softmax(-1)
        torch.testing.assert_close(exact.gather(1, ids.long()), logp.double(), rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(exact.gather(1, ids.long()), exact.topk(k).values, rtol=0, atol=1e-4)
        torch.testing.assert_close(1 - exact.gather(1, ids.long()).exp().sum(-1), tail.double(), rtol=1e-4, atol=1e-5)
    assert len(drawn) > 10, "each row draws its own"


def test_training_from_a_cache_loads_no_teacher(tiny, run, tmp_path, monkeypatch):
    tree = tree_of(tiny, tmp_path / "cache")
    assert run("cache", "cached", tree, "--top-k", "4").code == 0

    def load(config):
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(pipeline, "load_teacher", load)
    pipeline.run_pipeline(load_recipe(tiny.recipe(tmp_path / "again.yaml", tree)), tmp_path / "cached")
    assert (tmp_path / "cached" / "dft" / "model").is_dir()


def test_a_stage_that_is_interrupted_goes_on_with_its_cache_to_the_same_weights(tiny, run, train, tmp_path):
    tree = tree_of(tiny, tmp_path / "cache")
    assert run("cache", "whole", tree, "--top-k", "4").code == 0
    lines, weights = train("whole", tree)
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "dft" / "model")
    newest = max((tmp_path / "again" / "dft" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    shutil.rmtree(newest)
    ledger = json.loads((tmp_path / "again" / "pipeline.json").read_text(encoding="utf-8"))
    ledger["stages"][0]["state"] = "running"
    (tmp_path / "again" / "pipeline.json").write_text(json.dumps(ledger), encoding="utf-8")
    again, others = train("again", tree)
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    assert all(torch.equal(weight, weights[name]) for name, weight in others.items())


def refused(done, *words: str) -> None:
    assert done.code == 1, done.err
    assert "Traceback" not in done.err
    for word in words:
        assert word in done.err


def test_a_cache_that_is_not_there_or_of_another_teacher_is_refused(tiny, run, tmp_path):
    tree = tree_of(tiny, tmp_path / "cache")
    refused(run("train", "none", tree), "holds none", "llava-kd cache RECIPE")
    assert run("cache", "one", tree, "--top-k", "4").code == 0
    tree["teacher"]["dtype"] = "bfloat16"
    refused(run("train", "other", tree), "is of another teacher", "llava-kd cache RECIPE")


def test_rows_that_have_changed_since_are_refused_by_name(tiny, run, tmp_path):
    world = tmp_path / "world"
    shutil.copytree(tiny.world, world)
    rows = json.loads(tiny.mixed.read_text(encoding="utf-8"))
    (tmp_path / "mixed.json").write_text(json.dumps(rows), encoding="utf-8")
    tree = tree_of(tiny, tmp_path / "cache")
    tree["data"]["mixed"] |= {"path": str(tmp_path / "mixed.json"), "images": str(world / "images")}
    assert run("cache", "one", tree, "--top-k", "4").code == 0
    picture = world / "images" / rows[0]["image"]
    pixels = np.array(Image.open(picture))
    Image.fromarray(255 - pixels).save(picture)
    refused(run("train", "pixels", tree), f"has no row {rows[0]['id']!r}", "llava-kd cache RECIPE")
    Image.fromarray(pixels).save(picture)
    assert run("train", "mended", tree).code == 0
    rows[3]["conversations"][1]["value"] += " indeed"
    (tmp_path / "mixed.json").write_text(json.dumps(rows), encoding="utf-8")
    refused(run("train", "text", tree), f"has no row {rows[3]['id']!r}")
    assert run("cache", "anew", tree, "--top-k", "4").code == 0, "it is written over"
    assert run("train", "anew", tree).code == 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"losses": {"ce": 1.0, "response_kl": 1.0, "relation": 0.5}}, "without relation"),
        ({"losses": {"response_kl": 1.0, "divergence": "jsd"}}, "forward_kl"),
        ({"losses": {"response_kl": 1.0, "temperature": 2.0}}, "temperature 1"),
    ],
)
def test_losses_that_a_cache_cannot_serve_are_refused_for_the_stages_that_distil(tiny, run, tmp_path, changes, word):
    refused(run("train", "never", tree_of(tiny, tmp_path / "cache", **changes)), "stages.0 (dft).losses", word)
    refused(run("train", "never", tree_of(tiny, tmp_path) | {"cache_features": True}), "cache_features")


def test_numbers_that_make_no_cache_or_not_the_one_needed_are_refused(tiny, run, tmp_path):
    tree = tree_of(tiny, tmp_path / "cache")
    refused(run("cache", "wide", tree, "--top-k", "5000"), "--top-k 5000", f"share {widest(tiny)} ids")
    assert not (tmp_path / "cache" / "dft").exists()
    refused(run("cache", "none", tree_of(tiny)), "no teacher.cache")
    assert run("cache", "blind", tree, "--visual-share", "0", "--top-k", "4").code == 0
    refused(run("train", "blind", tree), "has no visual tokens", "losses.visual_kl is 1.0")
    tree["stages"][0]["losses"]["visual_kl"] = 0
    assert run("train", "seeing", tree).code == 0


def test_several_processes_would_write_over_each_other_and_are_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_make_accelerator", lambda recipe, out: SimpleNamespace(num_processes=2))
    recipe = load_recipe(tiny.recipe(tmp_path / "r.yaml", tree_of(tiny, tmp_path / "cache")))
    with pytest.raises(ValueError, match="written by one process, got 2"):
        pipeline.run_pipeline(recipe, tmp_path / "run", cache={"top_k": 4, "visual_share": 1.0})


def test_a_disk_with_too_little_room_is_said_before_anything_is_written(tiny, tmp_path, monkeypatch):
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: room)
    recipe = load_recipe(tiny.recipe(tmp_path / "r.yaml", tree_of(tiny, tmp_path / "cache")))
    with pytest.raises(ValueError, match=r"GiB, but .* are free; lower --top-k or --visual-share"):
        pipeline.run_pipeline(recipe, tmp_path / "run", cache={"top_k": 4, "visual_share": 1.0})
    assert not (tmp_path / "cache" / "dft").exists()


def test_a_row_that_is_left_out_needs_nothing_in_a_cache_whether_it_was_good_when_that_was_written(
    tiny, run, train, tmp_path
):
    world = tmp_path / "world"
    shutil.copytree(tiny.world, world)
    rows = json.loads(tiny.mixed.read_text(encoding="utf-8"))
    (tmp_path / "mixed.json").write_text(json.dumps(rows), encoding="utf-8")
    tree = tree_of(tiny, tmp_path / "cache") | {"max_bad_rows": 0.1}
    tree["data"]["mixed"] |= {"path": str(tmp_path / "mixed.json"), "images": str(world / "images")}
    picture = world / "images" / rows[0]["image"]
    whole = picture.read_bytes()
    assert run("cache", "one", tree, "--top-k", "4").code == 0
    picture.write_bytes(whole[:40])
    lines, _ = train("one", tree)
    assert lines[-1]["left_out"] == 2, "once in each of two epochs"
    assert run("cache", "two", tree, "--top-k", "4").code == 0
    lines, _ = train("two", tree)
    assert lines[-1]["left_out"] == 2
    picture.write_bytes(whole)
    refused(run("train", "three", tree), f"has no row {rows[0]['id']!r}")
