"""The committed recipes, run for real through the command line, shortened where noted."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoProcessor, LlavaForConditionalGeneration

ROOT = Path(__file__).parents[1]
NLVR = ROOT.parent / "shared" / "data" / "nlvr"


def rows_of(out):
    return {row["name"]: row for row in json.loads((out / "results.json").read_text(encoding="utf-8"))["rows"]}


@pytest.mark.slow
def test_the_smoke_recipe_runs_three_stages_and_each_model_loads_with_stock_classes(command, tmp_path):
    done = command("train", ROOT / "recipes/shapes/smoke.yaml", "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert set(rows_of(tmp_path / "run")) == {"teacher", "smoke"}
    assert "<html" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    picture = next((tmp_path / "run" / "world" / "images").glob("test-*.png"))
    for stage in ("dpt", "sft", "dft"):
        folder = tmp_path / "run" / stage / "model"
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        content = [{"type": "image", "url": str(picture)}, {"type": "text", "text": "what is in the north?"}]
        inputs = AutoProcessor.from_pretrained(folder).apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length
        answer = model.generate(**inputs, max_new_tokens=4)
        assert answer.shape[1] > inputs["input_ids"].shape[1]
        assert torch.isfinite(model(**inputs).logits).all()


@pytest.mark.slow
def test_quickstart_reports_teacher_control_and_distilled_student_of_equal_steps(monkeypatch, tmp_path):
    """Shortened: few scenes, few steps."""
    from llavakd import quickstart

    tree = yaml.safe_load(quickstart.RECIPE.read_text(encoding="utf-8"))
    tree["world"] |= {"scenes": 96, "test_questions": 30}
    for stage in tree["stages"]:
        stage |= {"global_batch_size": 32, "epochs": 1}
    tree["trackers"] = []
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    monkeypatch.setattr(quickstart, "RECIPE", tmp_path / "short.yaml")
    out = tmp_path / "out"
    quickstart.run_quickstart(out)
    rows = rows_of(out)
    assert set(rows) == {"teacher", "pt-sft-sft", "dpt-sft-dft"}
    assert rows["pt-sft-sft"]["steps"] == rows["dpt-sft-dft"]["steps"]
    starts = [yaml.safe_load((out / name / "recipe.yaml").read_text())["student"] for name in rows if name != "teacher"]
    assert starts[0] == starts[1]
    assert (out / "report.html").is_file()


@pytest.mark.slow
def test_foreign_pictures_and_statements_go_through_three_stages(command, tmp_path):
    """Shortened: a few of the statements."""
    if not NLVR.is_dir():
        pytest.skip("no Cornell NLVR beside the checkout (../shared/data/nlvr)")
    changes = [f"data.{source}.subset.stop=0.04" for source in ("pretrain", "instruct")]
    files = {"pretrain": "pretrain", "instruct": "instruct", "test": "instruct"}
    changes += [f"data.{source}.path={NLVR / name}.json" for source, name in files.items()]
    changes += [f"data.{source}.images={NLVR / 'images.zip'}" for source in files]
    changes += ["data.test.subset.stop=0.83", "trackers=[]"]
    changes += [f"stages.{stage}.epochs=0.5" for stage in ("sft", "dft")]
    done = command("train", ROOT / "recipes/nlvr/smoke.yaml", *changes, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    row = rows_of(tmp_path / "run")["nlvr-smoke"]
    assert 0.5 <= row["majority"] < 1
    assert row["n"] > 50
    lines = (tmp_path / "run" / "evaluation" / "nlvr-smoke" / "predictions.jsonl").read_text().splitlines()
    assert len({json.loads(line)["id"].split("-")[2] for line in lines}) > 3
