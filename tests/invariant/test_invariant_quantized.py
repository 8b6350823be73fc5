"""Through the command line: a stage that distils from a quantised teacher says how far that is from the exact one."""

from __future__ import annotations

import json

import pytest
import torch

from llavakd.config import TeacherConfig, parse_recipe
from llavakd.data.chat import Segment
from llavakd.data.collate import RowDataset, Source, collate
from llavakd.data.samples import load_samples
from llavakd.losses.rows import IGNORE_INDEX
from llavakd.models.quantized import quantize
from llavakd.models.student import load_teacher


def tree_of(tiny, **losses):
    """One distilling stage of two steps on rows with no, one and two pictures, its teacher in int8."""
    tree = tiny.tree()
    (stage,) = tree["stages"] = tree["stages"][2:]
    stage |= {"data": "mixed", "grouping": "none", "epochs": 0.5, "losses": losses or stage["losses"]}
    tree["teacher"] |= {"quantize": "int8", "max_drift": 10.0}
    return tree


@pytest.fixture
def train(tiny, command, tmp_path):
    def train(tree, *words):
        return command("train", tiny.recipe(tmp_path / "r.yaml", tree), "--out", tmp_path / "run", *words)

    return train


def noted(folder):
    (stage,) = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))["stages"]
    return stage


def drift_of(tiny, tree) -> dict[str, float]:
    """KL(exact || quantised) a token in float64, of the logits of stock models, over every second row of the 32."""
    exact, teacher = (load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32")) for _ in range(2))
    quantize(teacher, "int8")
    data = parse_recipe(tree).data["mixed"]
    source = Source(samples=load_samples(data)[::2], renderer=exact.renderer(data), data=data)
    found = {"mixed.response": [], "mixed.visual": []}
    rows = RowDataset([source], image_processor=exact.image_processor)
    for row in (rows[index] for index in range(len(rows))):
        batch = collate([row], pad_token_id=0)
        given = {"input_ids": batch.input_ids, "pixel_values": batch.pixel_values}
        with torch.no_grad():
            logits = [one.model(**given).logits[0, :, : len(exact.tokenizer)].double() for one in (exact, teacher)]
        p, q = (side.softmax(-1) for side in logits)
        kl = (p * (p / q).log()).sum(-1)
        found["mixed.response"].append(kl[:-1][batch.labels[0, 1:] != IGNORE_INDEX])
        found["mixed.visual"].append(kl[batch.segments[0] == Segment.VISUAL])
    return {name: float(torch.cat(parts).mean()) for name, parts in found.items()}


def test_the_drift_is_the_kl_between_both_teachers_and_stands_wherever_one_looks(tiny, train, tmp_path):
    tree = tree_of(tiny) | {"evaluation": {"data": "test", "max_new_tokens": 2}}
    done = train(tree)
    assert done.code == 0, done.err
    drift = noted(tmp_path / "run")["teacher_drift"]
    assert drift == pytest.approx(drift_of(tiny, tree), rel=1e-3)
    assert min(drift.values()) > 1e-5
    assert f"mixed.response {drift['mixed.response']:.2g}, mixed.visual {drift['mixed.visual']:.2g}" in done.err
    teacher, student = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert "teacher_drift" not in teacher
    assert student["teacher_drift"] == {"dft": drift}
    for page in ("report.md", "report.html"):
        text = (tmp_path / "run" / page).read_text(encoding="utf-8")
        assert f"{drift['mixed.visual']:.5f}" in text
        assert "The quantised teacher's drift" in text


def test_training_follows_the_quantised_teacher(tiny, train, tmp_path, command):
    assert train(tree_of(tiny)).code == 0
    other = command("train", tmp_path / "r.yaml", "teacher.quantize=none", "--out", tmp_path / "other")
    assert other.code == 0, other.err
    assert "teacher_drift" not in noted(tmp_path / "other")
    first = [
        json.loads((tmp_path / name / "dft" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
        for name in ("run", "other")
    ]
    assert first[0]["ce"] == first[1]["ce"]  # of the student, which has not moved yet
    for part in ("response_kl", "visual_kl"):
        assert first[0][part] != first[1][part]
        assert first[0][part] == pytest.approx(first[1][part], rel=0.05)


@pytest.mark.parametrize(("losses", "segments"), [({"response_kl": 1.0}, 1), ({"relation": 1.0}, 2)])
def test_pictures_count_where_the_stage_distils_them(tiny, train, tmp_path, losses, segments):
    done = train(tree_of(tiny, **losses))
    assert done.code == 0, done.err
    assert [*noted(tmp_path / "run")["teacher_drift"]] == ["mixed.response", "mixed.visual"][:segments]


def test_a_teacher_that_drifted_is_refused_with_its_kl_and_the_remedies(tiny, train, tmp_path):
    drift = drift_of(tiny, tree_of(tiny))
    larger, smaller = drift["mixed.response"], drift["mixed.visual"]
    assert smaller < 0.9 * larger
    most = (smaller + larger) / 2  # one of the two alone would pass
    refused = train(tree_of(tiny), f"teacher.max_drift={most}")
    assert refused.code == 1
    assert refused.err.count("error: ") == 1
    assert "Traceback" not in refused.err + refused.out
    for said in ("int8", f"{larger:.2g}", f"{smaller:.2g}", f"max_drift is {most}", "raise it", "int8 or none"):
        assert said in refused.err
    assert not (tmp_path / "run" / "dft" / "metrics.jsonl").exists()
    assert noted(tmp_path / "run")["state"] == "running"


def test_a_teacher_just_below_the_threshold_is_taken(tiny, train):
    larger = max(drift_of(tiny, tree_of(tiny)).values())
    assert train(tree_of(tiny), f"teacher.max_drift={1.01 * larger}").code == 0


def test_fp8_without_its_gpu_is_refused(tiny, train):
    refused = train(tree_of(tiny), "teacher.quantize=fp8")
    assert refused.code == 1
    assert "fp8 needs a Hopper GPU" in refused.err
    assert "use quantize: int8" in refused.err
    assert "Traceback" not in refused.err


def test_a_row_that_cannot_be_used_does_not_stop_the_probe(tiny, train, tmp_path):
    rows = json.loads(tiny.mixed.read_text(encoding="utf-8"))
    tree, broken = tree_of(tiny), rows[0]["image"]  # of the first of the probed rows
    (tmp_path / "pictures").mkdir()
    for path in (tiny.world / "images").iterdir():
        (tmp_path / "pictures" / path.name).write_bytes(b"no picture" if path.name == broken else path.read_bytes())
    tree["data"]["mixed"]["images"] = str(tmp_path / "pictures")
    done = train(tree | {"max_bad_rows": 0.5})
    assert done.code == 0, done.err
    whole = drift_of(tiny, tree_of(tiny))
    drift = noted(tmp_path / "run")["teacher_drift"]
    assert drift != pytest.approx(whole, rel=1e-3)  # of one row less
    assert drift == pytest.approx(whole, rel=0.5)
