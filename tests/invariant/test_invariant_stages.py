"""Through the command line: who learns in which stage, what is stored, and when a run folder is refused."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llavakd.config import load_recipe
from llavakd.models.student import build_student, load_student

STAGES = ("dpt", "sft", "dft")


@pytest.fixture(scope="module")
def run(tiny, command, tmp_path_factory):
    """A finished three-stage run."""
    folder = tmp_path_factory.mktemp("finished")
    tiny.recipe(folder / "recipe.yaml")
    done = command("train", folder / "recipe.yaml", "--out", folder / "run")
    assert done.code == 0, done.err
    return folder


def tensors(folder):
    return load_student(str(folder)).model.state_dict()


@pytest.fixture(scope="module")
def weights(run):
    """Every tensor at the start and after each stage."""
    start = build_student(load_recipe(run / "recipe.yaml").student, seed=1234).model.state_dict()
    return {"start": start} | {stage: tensors(run / "run" / stage / "model") for stage in STAGES}


def ledger(run) -> list[dict]:
    return json.loads((run / "pipeline.json").read_text())["stages"]


def changed(before, after) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_distilled_pretraining_changes_the_four_tensors_of_the_projector_and_nothing_else(weights):
    assert changed(weights["start"], weights["dpt"]) == {
        f"model.multi_modal_projector.linear_{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")
    }


def test_a_stage_starts_from_where_the_one_before_ended(tiny, command, tmp_path):
    """Stages whose steps are too small to be seen leave what the first one taught."""
    tree = tiny.tree()
    for stage in tree["stages"][1:]:
        stage["learning_rate"] = 1e-30
    done = command("train", tiny.recipe(tmp_path / "recipe.yaml", tree), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    first = tensors(tmp_path / "run" / "dpt" / "model")
    for stage in ("sft", "dft"):
        for name, tensor in tensors(tmp_path / "run" / stage / "model").items():
            torch.testing.assert_close(tensor, first[name], rtol=0, atol=1e-20)


@pytest.mark.parametrize(("before", "after"), [("dpt", "sft"), ("sft", "dft")])
def test_later_stages_change_everything_but_the_vision_tower(weights, before, after):
    names = set(weights["start"])
    assert changed(weights[before], weights[after]) == {n for n in names if ".vision_tower." not in n}
    assert len(names) > 40


def test_checkpoints_hold_the_tensors_that_learn_and_none_of_the_teacher(run, weights):
    language_model = {name for name in weights["start"] if ".language_model." in name}
    for stage in STAGES:
        newest = max((run / "run" / stage / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
        with safe_open(str(newest / "learning.safetensors"), framework="pt") as file:
            shapes = {name.removeprefix("model."): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        wanted = {name for name in weights["start"] if ".multi_modal_projector." in name}
        wanted |= set() if stage == "dpt" else language_model
        assert shapes == {name: tuple(weights["start"][name].shape) for name in wanted}
        optimizer = torch.load(newest / "optimizer.pt", weights_only=True)["optimizer"]
        assert (
            len(optimizer["state"]) == len(wanted) == sum(len(group["params"]) for group in optimizer["param_groups"])
        )


def test_the_saved_student_is_of_the_students_size(run, weights, tiny):
    with safe_open(str(run / "run" / "dft" / "model" / "model.safetensors"), framework="pt") as file:
        assert len(file.keys()) == len(weights["start"]) - 1  # the tied head is stored once
        rows, width = file.get_slice("language_model.model.embed_tokens.weight").get_shape()
    assert (rows, width) == (704, 32)
    assert load_student(str(tiny.teacher)).head.shape == (704, 48)


def test_metrics_name_every_step_and_the_parts_of_the_stages_loss(run):
    parts = {"loss", "ce", "grad_norm", "tokens_per_s", "lr", "memory_gib", "truncated", "left_out", "stage", "step"}
    kd = {"response_kl", "visual_kl", "relation"}
    steps_of = {stage["name"]: stage["steps"] for stage in ledger(run / "run")}
    assert steps_of["sft"] == steps_of["dft"] > steps_of["dpt"] == 4  # 48 rows in batches of 8, three quarters of them
    for stage, steps in steps_of.items():
        lines = [json.loads(line) for line in (run / "run" / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, steps + 1))
        assert all(set(line) == parts | (set() if stage == "sft" else kd) for line in lines)
        assert all(line["stage"] == stage and line["loss"] > 0 and line["grad_norm"] > 0 for line in lines)


def test_a_second_call_trains_nothing_and_leaves_every_file_of_the_stages(run, command):
    def state():
        files = [path for stage in STAGES for path in (run / "run" / stage).rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = state()
    again = command("train", run / "recipe.yaml", "--out", run / "run")
    assert again.code == 0, again.err
    assert state() == before
    assert [f"stage {stage}: done, skipped" in again.err for stage in STAGES] == [True] * 3


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stages.sft.learning_rate=1e-2", "stages.1.learning_rate: 0.001 -> 0.01"),
        ("seed=5", "seed: 1234 -> 5"),
        ("stages.dpt.losses.relation=1.0", "stages.0.losses.relation: 0.5 -> 1.0"),
        ("name=other", "name: 'tiny' -> 'other'"),
    ],
)
def test_another_recipe_in_the_same_folder_is_refused_naming_the_key(run, command, override, named):
    refused = command("train", run / "recipe.yaml", override, "--out", run / "run")
    assert refused.code == 1
    assert named in refused.err
    assert "--out" in refused.err
    assert "Traceback" not in refused.err


def one_stage(tiny, folder, **sources):
    tree = tiny.tree()
    tree["stages"] = tree["stages"][2:]
    tree["data"]["instruct"]["path"] = str(shutil.copy(tiny.world / "instruct.json", folder / "rows.json"))
    tree["teacher"]["path"] = str(shutil.copytree(tiny.teacher, folder / "teacher"))
    tree["student"]["vision_tower"] = str(shutil.copytree(tiny.teacher, folder / "tower"))
    return tiny.recipe(folder / "recipe.yaml", tree)


def change_rows(folder):
    rows = json.loads((folder / "rows.json").read_text())
    rows[3]["conversations"][1]["value"] += " so"
    (folder / "rows.json").write_text(json.dumps(rows))


def change_weights(folder):
    stored = load_file(str(folder / "model.safetensors"))
    stored["vision_tower.post_layernorm.bias"] += 1
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})


CHANGES = {
    "data": change_rows,
    "teacher": lambda folder: change_weights(folder / "teacher"),
    "start": lambda folder: change_weights(folder / "tower"),
}


def test_a_changed_file_under_a_begun_run_is_refused_naming_what_changed(tiny, command, tmp_path):
    recipe = one_stage(tiny, tmp_path)
    assert command("train", recipe, "--out", tmp_path / "run").code == 0
    kept = {
        name: (tmp_path / name).read_bytes()
        for name in ("rows.json", *(f"{n}/model.safetensors" for n in ("teacher", "tower")))
    }
    for what, change in CHANGES.items():
        change(tmp_path)
        refused = command("train", recipe, "--out", tmp_path / "run")
        assert refused.code == 1, what
        assert f"begun with another {what};" in refused.err
        assert "Traceback" not in refused.err
        for name, content in kept.items():
            (tmp_path / name).write_bytes(content)
    assert command("train", recipe, "--out", tmp_path / "run").code == 0


def test_the_teacher_is_scored_once_and_the_students_row_carries_the_runs_cost(tiny, command, tmp_path):
    tree = tiny.tree()
    tree["evaluation"] = {"data": "test", "batch_size": 6, "max_new_tokens": 3}
    done = command("train", tiny.recipe(tmp_path / "recipe.yaml", tree), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "tiny"]
    assert [row["steps"] for row in rows] == [None, sum(stage["steps"] for stage in ledger(tmp_path / "run"))]
    assert [row["n"] for row in rows] == [12, 12]
    assert "segments" not in rows[0]
    assert {name: part["positions"] for name, part in rows[1]["segments"].items()}["visual"] == 12 * 16
    assert all(part["kl"] > 0 for part in rows[1]["segments"].values())
    predictions = tmp_path / "run" / "evaluation" / "teacher" / "predictions.jsonl"
    stamp = predictions.stat().st_mtime_ns
    assert command("train", tmp_path / "recipe.yaml", "--out", tmp_path / "run").code == 0
    assert predictions.stat().st_mtime_ns == stamp
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"] == rows
