"""The recipe: read strictly, overridden by name, refused with the key and the remedy."""

from __future__ import annotations

import copy
import dataclasses
import re
import typing
from pathlib import Path

import pytest
import yaml

import llavakd
from llavakd.config import (
    DataConfig,
    LossConfig,
    Recipe,
    StageConfig,
    control_twin,
    differing_keys,
    dump_recipe,
    load_recipe,
    parse_recipe,
    resolve_paths,
)
from llavakd.data.chat import TEMPLATES
from llavakd.errors import RecipeError, UserError
from llavakd.losses.divergence import DIVERGENCES

TEXT = """\
name: small
student: {vision_tower: "package:shapes/parts/tower", language_model: some/where}
teacher: {path: "world:teacher"}
data:
  captions: {path: "world:pretrain.json", images: "world:images", template: pretrain}
  instruct: {path: /abs/instruct.json, images: pictures, subset: {group: "^[a-z]+"}}
stages:
  - {name: dpt, data: captions, train: [projector], learning_rate: 1e-3, global_batch_size: 8,
     losses: {ce: 1, response_kl: 1.0, visual_kl: 1.0, relation: 0.5}}
  - {name: sft, data: instruct, train: [projector, language_model], learning_rate: 2.0e-5, global_batch_size: 4,
     losses: {ce: 1.0}, epochs: 2, betas: [0.9, 0.95]}
  - {name: dft, data: instruct, train: [projector, language_model], learning_rate: 2e-5, global_batch_size: 4,
     losses: {ce: 1.0, response_kl: 1.0}}
evaluation: {data: instruct}
"""


@pytest.fixture
def path(tmp_path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(TEXT, encoding="utf-8")
    return file


def to_tree(recipe: Recipe) -> dict:
    return yaml.safe_load(dump_recipe(recipe))


def tree() -> dict:
    return to_tree(parse_recipe(yaml.safe_load(TEXT.replace("1e-3", "1.0e-3").replace("2e-5", "2.0e-5"))))


def changed(dotted: str, value: object) -> dict:
    """The good tree with one leaf replaced; `...` removes it."""
    whole = tree()
    node = whole
    *parents, last = dotted.split(".")
    for key in parents:
        node = node[int(key) if key.isdigit() else key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return whole


def test_a_good_recipe_is_read_with_its_defaults(path):
    recipe = load_recipe(path)
    assert [stage.name for stage in recipe.stages] == ["dpt", "sft", "dft"]
    assert recipe.stages[1] == StageConfig(
        name="sft",
        data="instruct",
        train=("projector", "language_model"),
        losses=LossConfig(ce=1.0),
        learning_rate=2e-5,
        global_batch_size=4,
        epochs=2,
        betas=(0.9, 0.95),
    )
    assert recipe.data["instruct"].template == "vicuna_v1"
    assert recipe.student.vision_feature_layer == -2
    assert (recipe.world, recipe.seed, recipe.precision) == (None, 1234, "bf16")


@pytest.mark.parametrize(
    ("written", "value"), [("1e-3", 1e-3), ("2E-5", 2e-5), ("1.5e2", 150.0), ("5.e+1", 50.0), ("1", 1.0)]
)
def test_numbers_in_powers_of_ten_are_numbers(path, written, value):
    path.write_text(TEXT.replace("1e-3", written), encoding="utf-8")
    got = load_recipe(path).stages[0].learning_rate
    assert got == value
    assert isinstance(got, float | int)


def test_reading_a_recipe_leaves_yaml_as_it_was(path):
    load_recipe(path)
    assert yaml.safe_load("1e-3") == "1e-3"
    assert yaml.safe_load("{a: 1, a: 2}") == {"a": 2}


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("sed", 3, "unknown key 'sed'; did you mean 'seed'?"),
        ("student.vision_tour", "x", "unknown key 'student.vision_tour'; did you mean 'vision_tower'?"),
        ("teacher.paht", "x", "unknown key 'teacher.paht'; did you mean 'path'?"),
        ("data.captions.imags", "x", "unknown key 'data.captions.imags'; did you mean 'images'?"),
        ("data.instruct.subset.stopp", 1.0, "unknown key 'data.instruct.subset.stopp'; did you mean 'stop'?"),
        ("stages.1.learning_rat", 1.0, "unknown key 'stages.1.learning_rat'; did you mean 'learning_rate'?"),
        ("stages.0.losses.respons_kl", 1.0, "unknown key 'stages.0.losses.respons_kl'; did you mean 'response_kl'?"),
        ("evaluation.batch", 4, "unknown key 'evaluation.batch'; did you mean 'batch_size'?"),
        ("stages.0.losses.zzz", 1.0, "unknown key 'stages.0.losses.zzz'; known: ce, response_kl, visual_kl, relation"),
        ("name", ..., "key 'name' is missing; add it"),
        ("student.language_model", ..., "key 'student.language_model' is missing"),
        ("stages.2.learning_rate", ..., "key 'stages.2.learning_rate' is missing"),
        ("seed", "7", "seed: got '7'; input should be a valid integer"),
        ("seed", 7.5, "seed: got 7.5"),
        ("gradient_checkpointing", 1, "gradient_checkpointing: got 1"),
        ("stages.0.learning_rate", "1e-3", "stages.0.learning_rate: got '1e-3'; input should be a valid number"),
        ("stages.0.train", "projector", "stages.0.train: got 'projector'"),
        ("stages.0.betas", [0.9], "stages.0.betas"),
        ("student", None, "student: got None"),
        ("stages.0.train", ["projectr"], "'projector' or 'language_model'; did you mean 'projector'?"),
        ("data.captions.template", "vicuna", "'vicuna_v1' or 'chatml'; did you mean 'vicuna_v1'?"),
        ("precision", "fp16", "precision: got 'fp16', expected 'fp32' or 'bf16'"),
        ("stages.1.losses.divergence", "kl", "stages.1.losses.divergence: got 'kl'"),
    ],
)
def test_a_key_that_cannot_be_right_is_named_with_the_nearest_one(dotted, value, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        parse_recipe(changed(dotted, value))


def test_every_problem_is_told_at_once():
    wrong = changed("seed", "x")
    wrong["sed"] = 1
    del wrong["name"]
    with pytest.raises(RecipeError) as caught:
        parse_recipe(wrong)
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("dotted", "value", "message"),
    [
        ("teacher", None, r"stages\.0 \(dpt\)\.losses\.response_kl: distils, .*add teacher"),
        ("stages.0.train", [], r"stages\.0\.train: got \[\]; tuple should have at least 1 item"),
        ("stages.1.data", "instrct", r"stages\.1 \(sft\)\.data: no source 'instrct'.*did you mean 'instruct'\?"),
        ("evaluation.data", "tests", r"evaluation\.data: no source 'tests'"),
        ("stages.2.name", "sft", "two stages are called 'sft'"),
        ("stages.2.name", "../dft", r"stages\.2\.name: got '\.\./dft'; string should match"),
        ("stages.2.name", "", r"stages\.2\.name: got ''; string should match"),
        ("stages", [], r"stages: got \[\]; tuple should have at least 1 item"),
        ("stages.1.losses", {}, r"stages\.1 \(sft\)\.losses: every weight is 0"),
        ("stages.1.losses.ce", -1.0, r"losses\.ce: got -1"),
        ("stages.1.losses.ce", float("nan"), r"losses\.ce: got nan"),
        ("stages.1.losses.ce", float("inf"), r"losses\.ce: got inf"),
        ("stages.0.losses.temperature", 0.0, r"losses\.temperature: got 0.0; input should be greater than 0"),
        ("stages.0.losses.beta", 1.5, r"losses\.beta: got 1.5; input should be less than or equal to 1"),
        ("stages.0.learning_rate", 0.0, r"stages\.0\.learning_rate: got 0.0; input should be greater than 0"),
        ("stages.0.learning_rate", float("inf"), r"stages\.0\.learning_rate: got inf; input should be a finite number"),
        ("stages.0.epochs", 0, r"stages\.0\.epochs: got 0; input should be greater than 0"),
        ("stages.0.global_batch_size", 0, r"global_batch_size: got 0"),
        ("stages.0.micro_batch_size", 3, r"micro_batch_size: got 3, expected a divisor of global_batch_size 8"),
        ("stages.0.micro_batch_size", 0, r"micro_batch_size: got 0"),
        ("stages.0.max_tokens_per_batch", 0, r"max_tokens_per_batch: got 0"),
        (
            "stages.0.max_tokens_per_batch",
            1024,
            r"stages\.0 \(dpt\)\.max_tokens_per_batch: got 1024, less than max_length 2048 of data\.captions",
        ),
        ("save_every", 0, "save_every: got 0"),
        ("data.instruct.subset.stop", 1.5, r"data\.instruct\.subset\.stop: got 1.5"),
        ("data.instruct.subset.group", "(", r"data\.instruct\.subset\.group: '\(' is no regular expression"),
        ("log_every", 0, "log_every: got 0"),
        ("world", {"scenes": 0}, r"world\.scenes: got 0"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused(dotted, value, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe(changed(dotted, value))


def test_packs_take_the_place_of_micro_batches_of_rows():
    tree = changed("stages.0.max_tokens_per_batch", 2048)
    assert parse_recipe(tree).stages[0].max_tokens_per_batch == 2048
    tree["stages"][0]["micro_batch_size"] = 4
    with pytest.raises(RecipeError, match=r"dpt\)\.max_tokens_per_batch: .* micro_batch_size, .*; remove one"):
        parse_recipe(tree)


def test_layers_are_compiled_under_every_sharding_but_zero3():
    tree = changed("compile", True)
    for sharding in ("none", "student", "both", "zero2"):
        assert parse_recipe(tree | {"sharding": sharding}).compile
    with pytest.raises(RecipeError, match=r"compile: got true, but hooks of sharding zero3 .*; set sharding: zero2"):
        parse_recipe(tree | {"sharding": "zero3"})


def test_a_pack_must_have_room_for_a_row_of_each_source():
    tree = changed("stages.1.data", {"instruct": 1.0, "captions": 0.5})
    tree["stages"][1]["max_tokens_per_batch"] = 3000
    assert parse_recipe(tree)
    tree["data"]["captions"]["max_length"] = 3001
    with pytest.raises(
        RecipeError, match=r"max_tokens_per_batch: got 3000, less than max_length 3001 of data\.captions"
    ):
        parse_recipe(tree)


def test_a_recipe_without_distillation_needs_no_teacher():
    plain = changed("teacher", None)
    for stage in plain["stages"]:
        stage["losses"] = {"ce": 1.0}
    recipe = parse_recipe(plain)
    assert recipe.teacher is None
    assert not any(stage.losses.distils for stage in recipe.stages)


@pytest.mark.parametrize("part", ["response_kl", "visual_kl", "relation"])
def test_each_distilling_part_alone_needs_a_teacher(part):
    alone = changed("teacher", None)
    for stage in alone["stages"]:
        stage["losses"] = {"ce": 1.0}
    alone["stages"][1]["losses"][part] = 0.1
    with pytest.raises(RecipeError, match=rf"stages\.1 \(sft\)\.losses\.{part}: distils"):
        parse_recipe(alone)
    losses = LossConfig(**{part: 0.1})
    assert losses.distils
    assert losses.weights == dict.fromkeys(LossConfig().weights, 0.0) | {part: 0.1}
    assert not LossConfig(ce=1.0).distils


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nname: b\n", r"key 'name' stands twice \(line 2\)"),
        ("data:\n  x: {path: a, path: b}\n", r"key 'path' stands twice \(line 2\)"),
        ("stages:\n  - losses: {ce: 1,\n      ce: 2}\n", r"key 'ce' stands twice \(line 3\)"),
        ("? [a]\n: b\n", "found unhashable key"),
        ("name: [a\n", r"cannot read the recipe .*: while parsing a flow sequence"),
        ("- a\n", r"recipe\.yaml: the recipe: got \['a'\]; input should be an object"),
        ("", "the recipe: got None; input should be an object"),
        (f"{TEXT}seed: 2026-01-01\n", "seed: got '2026-01-01'; input should be a valid integer"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(path, text, message):
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*none\.yaml: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes("name: é".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*latin\.yaml: 'utf-8' codec can't decode"):
        load_recipe(tmp_path / "latin.yaml")


def test_a_recipe_error_is_the_users_error():
    assert issubclass(RecipeError, UserError)


@pytest.mark.parametrize(
    ("override", "dotted", "value"),
    [
        ("seed=7", "seed", 7),
        ("stages.dft.learning_rate=3e-4", "stages.2.learning_rate", 3e-4),
        ("stages.2.learning_rate=3e-4", "stages.2.learning_rate", 3e-4),
        ("stages.sft.losses.ce=0.5", "stages.1.losses.ce", 0.5),
        ("stages.dpt.train=[projector, language_model]", "stages.0.train", ["projector", "language_model"]),
        ("data.captions.path=a=b.json", "data.captions.path", "a=b.json"),
        ("data.instruct.subset.stop=0.5", "data.instruct.subset.stop", 0.5),
        ("teacher.dtype=float32", "teacher.dtype", "float32"),
        ("evaluation=null", "evaluation", None),
    ],
)
def test_an_override_changes_one_value_and_nothing_else(path, override, dotted, value):
    assert to_tree(load_recipe(path, [override])) == changed(dotted, value)


def test_a_stage_name_goes_before_a_stage_number(path):
    path.write_text(TEXT.replace("name: dft", 'name: "0"'), encoding="utf-8")
    recipe = load_recipe(path, ["stages.0.epochs=3"])
    assert [stage.epochs for stage in recipe.stages] == [1.0, 2.0, 3.0]


def test_later_overrides_win(path):
    assert load_recipe(path, ["seed=1", "seed=2"]).seed == 2


def test_an_override_can_add_what_the_recipe_leaves_out(path):
    added = ["world.scenes=30", "world.seed=2", "data.captions.subset.group=^x"]
    recipe = load_recipe(path, added)
    assert recipe.world is not None
    assert (recipe.world.scenes, recipe.world.seed) == (30, 2)
    assert recipe.data["captions"].subset is not None
    path.write_text(dump_recipe(load_recipe(path)), encoding="utf-8")  # a dumped recipe says `world: null`
    assert load_recipe(path, added) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not of the form key.key=value"),
        ("=3", "not of the form key.key=value"),
        ("stages.ddft.epochs=1", r"stages\.ddft is not a mapping; did you mean 'dft'\?"),
        ("stages.3.epochs=1", r"stages\.3 is not a mapping; known: 0, 1, 2, dpt, sft, dft"),
        ("stages.dft=1", "stages is a list; name one of its entries"),
        ("studnt.vision_tower=x", r"studnt is not a mapping; did you mean 'student'\?"),
        ("name.x=1", "name is not a mapping; known: student, teacher, data"),
        ("stages.dft.epohcs=1", r"unknown key 'stages\.2\.epohcs'; did you mean 'epochs'\?"),
        ("seed=[", r"override 'seed=\[': while parsing a flow"),
    ],
)
def test_a_wrong_override_is_refused(path, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(path, [override])


def test_overriding_a_stage_list_of_no_mappings_is_refused(path):
    path.write_text("name: x\nstages: [dpt]\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"stages\.dpt is not a mapping"):
        load_recipe(path, ["stages.dpt.epochs=1"])


def test_a_dumped_recipe_reads_back_equal(path):
    recipe = load_recipe(path, ["name=größe", "stages.dpt.learning_rate=1e-7"])
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    assert parse_recipe(to_tree(recipe)) == recipe
    assert set(to_tree(recipe)) == {field.name for field in dataclasses.fields(Recipe)}


def test_differing_keys_name_every_leaf_with_both_values():
    old, new = tree(), tree()
    assert differing_keys(old, new) == []
    new["seed"] = 9
    new["stages"][1]["losses"]["ce"] = 0.5
    new["data"]["more"] = None
    new["evaluation"] = None
    new["stages"][0]["train"] = ["projector", "language_model"]
    del new["workers"]
    assert sorted(differing_keys(old, new)) == [
        f"evaluation: {old['evaluation']!r} -> None",
        "seed: 1234 -> 9",
        "stages.0.train: ['projector'] -> ['projector', 'language_model']",
        "stages.1.losses.ce: 1.0 -> 0.5",
        "workers: 2 -> None",
    ]


def test_the_control_twin_differs_in_names_losses_and_teacher_only(path):
    recipe = load_recipe(path)
    twin = control_twin(recipe)
    assert twin.name == "pt-sft-sft"
    assert [stage.name for stage in twin.stages] == ["pt", "sft", "sft2"]
    assert all(stage.losses == LossConfig(ce=1.0) for stage in twin.stages)
    expected = copy.deepcopy(to_tree(recipe))
    expected |= {"name": "pt-sft-sft", "teacher": None}
    for stage, name in zip(expected["stages"], ("pt", "sft", "sft2"), strict=True):
        stage["name"], stage["losses"] = name, dataclasses.asdict(LossConfig(ce=1.0))
    assert to_tree(twin) == expected
    assert parse_recipe(to_tree(twin)) == twin


def test_stages_of_other_names_get_a_twin_too(path):
    twin = control_twin(load_recipe(path, ["stages.dft.name=polish"]))
    assert [stage.name for stage in twin.stages] == ["pt", "sft", "polish-plain"]


def test_path_prefixes_lead_to_the_run_and_to_the_package(path, tmp_path):
    recipe = load_recipe(path)
    placed = resolve_paths(recipe, tmp_path / "run")
    assert placed.student.vision_tower == str(Path(llavakd.__file__).parent / "assets" / "shapes" / "parts" / "tower")
    assert Path(placed.student.vision_tower, "config.json").is_file()
    assert placed.student.language_model == "some/where"
    assert placed.teacher is not None
    assert placed.teacher.path == str(tmp_path / "run" / "world" / "teacher")
    assert placed.data["captions"].path == str(tmp_path / "run" / "world" / "pretrain.json")
    assert placed.data["captions"].images == str(tmp_path / "run" / "world" / "images")
    assert placed.data["instruct"] == recipe.data["instruct"], "other paths stay"
    restored = dataclasses.replace(placed, student=recipe.student, teacher=recipe.teacher, data=recipe.data)
    assert restored == recipe, "nothing else changes"


def test_a_source_without_pictures_and_a_recipe_without_teacher_are_placed_too():
    plain = changed("teacher", None)
    for stage in plain["stages"]:
        stage["losses"] = {"ce": 1.0}
    plain["data"]["captions"]["images"] = None
    placed = resolve_paths(parse_recipe(plain), Path("run"))
    assert placed.teacher is None
    assert placed.data["captions"].images is None


def test_the_names_a_recipe_may_use_are_those_that_exist():
    hints = typing.get_type_hints
    assert set(typing.get_args(hints(DataConfig)["template"])) == set(TEMPLATES)
    assert set(typing.get_args(hints(LossConfig)["divergence"])) == set(DIVERGENCES)
    assert tuple(LossConfig().weights) == ("ce", "response_kl", "visual_kl", "relation")


@pytest.mark.parametrize("file", sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_of_the_repository_can_be_read(file):
    assert load_recipe(file).stages
