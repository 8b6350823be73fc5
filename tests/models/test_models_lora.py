"""Low-rank updates start at nothing, learn alone, are merged exactly, and come back after an interruption."""

import json
import shutil

import pytest
import torch
from torch import nn

from llavakd.config import RecipeError, load_recipe
from llavakd.models.student import add_updates, build_student, load_student

RANK = 3


@pytest.fixture
def student(tiny, tmp_path):
    return build_student(load_recipe(tiny.recipe(tmp_path / "student.yaml")).student, seed=0)


def hidden(student) -> torch.Tensor:
    ids = torch.arange(3, 23)[None]
    return student.model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def matrices(student) -> dict[str, torch.Tensor]:
    layers = student.parts()["language_model"].layers.named_modules()
    return {name: layer.weight.detach().clone() for name, layer in layers if isinstance(layer, nn.Linear)}


def test_fresh_updates_change_nothing_and_merging_adds_their_scaled_product(student):
    before, plain, names = matrices(student), hidden(student), set(student.model.state_dict())
    updates = add_updates(student, RANK, seed=0)
    assert torch.equal(hidden(student), plain)
    parts = dict(student.parts()["language_model"].layers.named_parameters())
    with torch.no_grad():
        for name, values in parts.items():
            if ".lora_B." in name:
                values.normal_(std=0.1)
    apart = hidden(student)
    assert not torch.allclose(apart, plain, atol=1e-2)
    wanted = {
        name: weight.double()
        + 2 * parts[f"{name}.lora_B.default.weight"].double() @ parts[f"{name}.lora_A.default.weight"].double()
        for name, weight in before.items()
    }
    assert len(wanted) == 7 * student.model.config.text_config.num_hidden_layers
    updates.merge_and_unload()
    assert set(student.model.state_dict()) == names
    for name, weight in matrices(student).items():
        assert torch.allclose(weight.double(), wanted[name], atol=1e-6)
    assert torch.allclose(hidden(student), apart, atol=1e-4)


def test_only_updates_and_the_projector_learn(student):
    student.train_only(["projector"])
    add_updates(student, RANK, seed=0)
    learning = {name for name, values in student.model.named_parameters() if values.requires_grad}
    updates = {name for name in learning if ".lora_A." in name or ".lora_B." in name}
    assert len(updates) == 2 * 7 * student.model.config.text_config.num_hidden_layers
    assert all("multi_modal_projector" in name for name in learning - updates)
    assert len(learning - updates) == 4


def test_the_seed_decides_where_they_start(student, tiny, tmp_path):
    other = build_student(load_recipe(tiny.recipe(tmp_path / "other.yaml")).student, seed=5)
    for one in (student, other):
        torch.rand(len(one.tokenizer) % 7)
        add_updates(one, RANK, seed=3)
    found = [[v for name, v in one.model.named_parameters() if ".lora_A." in name] for one in (student, other)]
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


@pytest.fixture(scope="module")
def run(tiny, command, tmp_path_factory):
    """A finished run whose last stage has low-rank updates."""
    folder, tree = tmp_path_factory.mktemp("low-rank"), tiny.tree()
    tree["stages"][2]["lora_rank"] = RANK
    done = command("train", tiny.recipe(folder / "recipe.yaml", tree), "--out", folder / "run")
    assert done.code == 0, done.err
    return folder


def test_a_stage_leaves_a_plain_model_whose_matrices_changed_by_the_rank_and_the_rest_not_at_all(run):
    sft, dft = (load_student(str(run / "run" / stage / "model")).model.state_dict() for stage in ("sft", "dft"))
    assert sft.keys() == dft.keys()
    changed = {name: (dft[name] - sft[name]).double() for name in sft if not torch.equal(sft[name], dft[name])}
    layers = {name: change for name, change in changed.items() if ".language_model.layers." in name}
    assert {name for name in sft if "_proj.weight" in name and ".language_model." in name} == layers.keys()
    for change in layers.values():
        sizes = torch.linalg.svdvals(change)
        assert sizes[2] > 0.01 * sizes[0] or sizes[1] > 0.01 * sizes[0]
        assert sizes[3] < 1e-4 * sizes[0]
    assert len(changed) - len(layers) == 4  # of the projector


def test_a_stage_goes_on_from_its_checkpoint_to_the_same_weights(run, command, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    place = tmp_path / "copy" / "run"
    ledger = json.loads((place / "pipeline.json").read_text())
    ledger["stages"][2] = {key: ledger["stages"][2][key] for key in ("name", "fingerprint")} | {"state": "running"}
    (place / "pipeline.json").write_text(json.dumps(ledger))
    *_, newest = sorted((place / "dft" / "checkpoints").iterdir())
    shutil.rmtree(newest)
    shutil.rmtree(place / "dft" / "model")
    done = command("train", tmp_path / "copy" / "recipe.yaml", "--out", place)
    assert done.code == 0, done.err
    assert "resuming after step" in done.err
    one, other = (load_student(str(folder / "dft" / "model")).model.state_dict() for folder in (run / "run", place))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_updates_of_a_language_model_that_does_not_learn_are_refused(tiny, tmp_path):
    path = tiny.recipe(tmp_path / "recipe.yaml")
    with pytest.raises(RecipeError, match=r"stages\.0 \(dpt\)\.lora_rank: .* train is projector; add language_model"):
        load_recipe(path, ["stages.dpt.lora_rank=4"])
