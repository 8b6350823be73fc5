"""The committed recipes, run for real through the command line, shortened where noted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from plan_llava_kd import QWEN, STUDENTS, local, write_configs
from transformers import AutoProcessor, LlavaForConditionalGeneration

from llavakd.config import load_recipe

ROOT = Path(__file__).parents[1]
LLAVA_KD = ROOT / "recipes" / "llava_kd"
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


PLAIN = {
    "teacher-qwen2.5-3b": ["pt", "sft"],
    "teacher-qwen1.5-4b": ["pt", "sft"],
    "qwen2.5-0.5b-pt-sft": ["pt", "sft"],
    "qwen2.5-0.5b-pt-sft-sft": ["pt", "sft", "sft2"],
}


@pytest.fixture(scope="module")
def true_configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    write_configs(folder)
    return folder


def test_the_llava_kd_recipes_are_these():
    assert {path.stem for path in LLAVA_KD.glob("*.yaml")} == {*STUDENTS, *PLAIN}


@pytest.mark.parametrize("name", [*STUDENTS, *PLAIN])
def test_the_llava_kd_recipes_hold_the_published_values(name):
    recipe = load_recipe(LLAVA_KD / f"{name}.yaml")
    assert recipe.name == name
    assert [stage.name for stage in recipe.stages] == PLAIN.get(name, ["dpt", "sft", "dft"])
    assert recipe.seed == 1234
    assert recipe.gradient_checkpointing
    hub = recipe.student.language_model
    assert hub.lower() == "qwen/" + name.removeprefix("teacher-").split("-pt-")[0]
    student = (recipe.student.vision_tower, recipe.student.vision_feature_layer, recipe.student.projector)
    assert student == ("google/siglip-so400m-patch14-384", -2, "mlp2x_gelu")
    assert recipe.student.vision_feature_select_strategy == "default"
    for stage in recipe.stages:
        first = stage is recipe.stages[0]
        assert stage.train == (("projector",) if first else ("projector", "language_model"))
        assert stage.data == ("pretrain" if first else "instruct")
        assert (stage.learning_rate, stage.global_batch_size) == ((1e-3, 256) if first else (2e-5, 128))
        assert (stage.epochs, stage.warmup_ratio, stage.weight_decay, stage.max_grad_norm) == (1, 0.03, 0, 1)
        assert (stage.grouping == "none") == first
        distils = stage.name in ("dpt", "dft")
        assert list(stage.losses.weights.values()) == ([1, 1, 1, 0.5] if distils else [1, 0, 0, 0])
        assert (stage.losses.divergence, stage.losses.temperature) == ("forward_kl", 1)
        assert stage.reduction == ("token" if name.startswith("teacher") else "sample")
    assert {source.max_length for source in recipe.data.values()} == {2048}
    assert [recipe.data[source].template for source in ("pretrain", "instruct")] == ["pretrain", "vicuna_v1"]
    if name in STUDENTS:
        assert recipe.teacher.path == f"runs/teacher-{STUDENTS[name]}/sft/model"


def test_the_control_recipe_is_the_distilled_one_without_a_teacher():
    distilled, control = (
        dataclasses.asdict(load_recipe(LLAVA_KD / f"qwen2.5-0.5b{end}.yaml")) for end in ("", "-pt-sft-sft")
    )
    for tree in (distilled, control):
        for key in ("name", "teacher"):
            tree.pop(key)
        for stage in tree["stages"]:
            del stage["name"], stage["losses"]
    assert distilled == control


@pytest.mark.parametrize("name", ["qwen2.5-0.5b"])
def test_plan_runs_on_the_llava_kd_recipes_at_their_true_sizes(command, true_configs, name):
    words = [LLAVA_KD / f"{name}.yaml", *local(true_configs, name), "--gpu", "H100", "--gpus", 8, "--json"]
    done = command("plan", *words)
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    language_model = name.removeprefix("teacher-")
    assert plan["parameters"]["student"]["language_model"] == QWEN[language_model][-1]
    if name in STUDENTS:
        assert plan["parameters"]["teacher"]["language_model"] == QWEN[STUDENTS[name]][-1]
    width = QWEN[language_model][0]
    assert plan["stages"][0]["trainable"] == 1152 * width + width + width * width + width
    assert [stage["steps"] for stage in plan["stages"]] == [2180, 5197, 5197][: len(plan["stages"])]
    assert {stage["tokens"]["visual"] for stage in plan["stages"]} == {728}
    assert all(stage["micro_batch_size"] * stage["accumulation"] * 8 in (128, 256) for stage in plan["stages"])
    assert len([line for line in plan["assumptions"] if "no file" in line]) == 2
    # Two FLOPs per parameter and token, were the embedding a product and attention free.
    forward = 2 * 5197 * 128 * 928 * QWEN[language_model][-1]
    assert 0.6 < plan["stages"][1]["flops"]["student_forward"] / forward < 1.3
