"""Updates over a base in 4 bits: what the base is rounded to, gradients through it, and what a stage leaves behind."""

import copy
import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import LlavaForConditionalGeneration

from llavakd.config import RecipeError, load_recipe
from llavakd.errors import UserError
from llavakd.models.fast import compile_layers
from llavakd.models.quantized import NF4Linear
from llavakd.models.student import add_updates, build_student

RANK = 3
CPU = torch.device("cpu")
# Appendix E of arXiv 2305.14314.
LEVELS = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635]
LEVELS += [-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725]
LEVELS += [0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def linear(out: int, into: int) -> nn.Linear:
    torch.manual_seed(out + into)
    layer = nn.Linear(into, out).requires_grad_(False)
    nn.init.normal_(layer.weight, std=0.05)
    return layer


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What a matrix becomes in NF4, float32; the first test below says that it is right."""
    layer = nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight = nn.Parameter(weight.clone(), False)
    return NF4Linear(layer, CPU).widened().weight


def test_every_block_is_rounded_to_the_nearest_of_16_levels_times_a_scale_in_8_bits():
    layer = linear(256, 192)
    exact = layer.weight.double().reshape(-1, 64)
    found = NF4Linear(layer, CPU).widened().weight
    assert found.dtype == torch.float32
    blocks, levels = found.double().reshape(-1, 64), torch.tensor(LEVELS, dtype=torch.float64)
    scales, exact_scales = (values.abs().amax(1, keepdim=True) for values in (blocks, exact))
    assert torch.allclose(scales, exact_scales, rtol=0.02)
    assert len(exact_scales.unique()) == len(exact)
    assert all(len(some.unique()) < 200 for some in scales.split(256))  # which share one table of 256
    nearest = (exact / exact_scales).unsqueeze(-1).sub(levels).abs().argmin(-1)
    assert torch.allclose(blocks, levels[nearest] * scales, atol=1e-7)


def test_a_layer_is_held_in_an_eighth_of_its_bytes():
    held = NF4Linear(linear(512, 384), CPU)
    assert held.weight.dtype == torch.uint8
    assert held.weight.nbytes == 512 * 384 // 2
    state = held.state
    scales = state.absmax.nbytes + state.state2.absmax.nbytes
    assert scales < 512 * 384 / 60
    assert state.absmax.dtype == torch.uint8
    assert [name for name, _ in held.named_parameters()] == ["weight", "linear.bias"]  # no float32 copy is left


@pytest.mark.parametrize("out", [40, 41])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_layer_and_the_gradient_through_it_are_those_of_the_rounded_weight(bf16, out):
    layer = linear(out, 64)
    bias = layer.bias.clone()
    held, weight = NF4Linear(layer, CPU), rounded(linear(out, 64).weight)
    assert weight.shape == (out, 64)
    assert held.state.shape[0] % 2 == 0  # a kernel of bitsandbytes 0.50 stores outputs in pairs
    x = torch.randn(2, 5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        y = held(x)
    assert y.dtype == (torch.bfloat16 if bf16 else torch.float32)
    outward = torch.randn(2, 5, out).to(y.dtype)
    y.backward(outward)
    near = {"rtol": 0.0, "atol": 0.02 if bf16 else 1e-6}
    assert torch.allclose(y.double(), x.double() @ weight.double().T + bias.double(), **near)
    assert torch.allclose(x.grad.double(), outward.double() @ weight.double(), **near)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        assert torch.equal(torch.compile(held, backend="aot_eager", fullgraph=True)(x), y)
    assert torch.equal(held.widened().bias, bias)  # as exact as before


@pytest.fixture
def student(tiny, tmp_path):
    return build_student(load_recipe(tiny.recipe(tmp_path / "student.yaml")).student, seed=0)


def with_updates(student):
    """The base in 4 bits below updates that are no longer zero; peft's model and its layers."""
    updates = add_updates(student, RANK, seed=0)
    layers = [layer for layer in updates.modules() if hasattr(layer, "base_layer")]
    for layer in layers:
        layer.base_layer = NF4Linear(layer.base_layer, CPU)
    with torch.no_grad():
        for name, values in student.model.named_parameters():
            if ".lora_B." in name:
                values.normal_(std=0.1)
    return updates, layers


def hidden(student) -> torch.Tensor:
    ids = torch.arange(3, 23)[None]
    return student.model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def loss(hidden: torch.Tensor) -> torch.Tensor:
    return hidden[..., ::2].pow(3).mean()


def gradients(student) -> dict[str, torch.Tensor]:
    """Of the updates, for a loss that every position takes part in."""
    student.model.zero_grad()
    loss(hidden(student)).backward()
    return {name: v.grad.clone() for name, v in student.model.named_parameters() if v.grad is not None}


def test_gradients_of_the_updates_are_those_of_float64_over_the_rounded_base(student):
    student.train_only(["projector"])
    plain = copy.deepcopy(student.model).double()
    bases = {
        name: v for name, v in student.model.named_parameters() if ".language_model.layers." in name and v.ndim > 1
    }
    bases = {name: rounded(values.detach()).double() for name, values in bases.items()}
    with_updates(student)
    found = gradients(student)
    assert len(found) == 2 * len(bases) == 2 * 7 * student.model.config.text_config.num_hidden_layers
    given = dict(student.model.named_parameters())
    learning = {name: given[name].detach().double().requires_grad_() for name in found}
    weights = {}
    for name, weight in bases.items():
        a, b = (learning[f"{name.removesuffix('.weight')}.lora_{side}.default.weight"] for side in "AB")
        weights[name.removeprefix("model.")] = weight + 2 * b @ a
    ids = torch.arange(3, 23)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    loss(functional_call(plain.model, weights, kwargs=inputs).last_hidden_state).backward()
    for name, values in found.items():
        wanted = learning[name].grad
        assert float((values - wanted).norm() / wanted.norm()) < 1e-4, name


def test_the_merged_model_computes_what_the_trained_one_did(student):
    names, before = list(student.model.state_dict()), hidden(student).detach()
    updates, layers = with_updates(student)
    trained = hidden(student).detach()
    assert float((trained - before).norm() / before.norm()) > 0.05
    for layer in layers:
        layer.base_layer = layer.base_layer.widened()
    updates.merge_and_unload()
    assert sorted(student.model.state_dict()) == sorted(names)
    assert torch.allclose(hidden(student), trained, atol=1e-4)
    assert {values.dtype for values in student.model.state_dict().values()} == {torch.float32}


def test_head_embeddings_tower_and_projector_stay_in_float32(student):
    with_updates(student)
    kinds = {name: values.dtype for name, values in student.model.named_parameters()}
    narrow = {name for name, kind in kinds.items() if kind == torch.uint8}
    assert all(".language_model.layers." in name and "_proj." in name for name in narrow)
    assert len(narrow) == 7 * student.model.config.text_config.num_hidden_layers
    assert {kinds[name] for name in kinds.keys() - narrow} == {torch.float32}
    assert student.head.dtype == torch.float32


@pytest.mark.parametrize("how", [pytest.param("compiled", marks=pytest.mark.slow), "computed twice"])
def test_gradients_are_the_same_where_layers_are(student, how):
    student.train_only(["projector"])
    with_updates(student)
    student.model.train()
    plain = gradients(student)
    if how == "compiled":
        compile_layers(student.model, backend="aot_eager")
    else:
        student.model.gradient_checkpointing_enable()
    again = gradients(student)
    torch.compiler.reset()
    assert all(torch.allclose(values, again[name], rtol=1e-4, atol=1e-7) for name, values in plain.items())
    assert all(values.abs().max() > 1e-4 for values in plain.values())


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (["stages.sft.lora_rank=null"], "lora_rank None and sharding none"),
        (["sharding=student"], "lora_rank 3 and sharding student"),
        (["sharding=both"], "lora_rank 3 and sharding both"),
        (["sharding=zero2"], "lora_rank 3 and sharding zero2"),
    ],
)
def test_without_updates_or_in_shards_it_is_refused(tiny, tmp_path, changes, found):
    path = tiny.recipe(tmp_path / "recipe.yaml", tree(tiny))
    load_recipe(path)
    with pytest.raises(RecipeError, match=rf"stages\.1 \(sft\)\.lora_base: got nf4 with {found}; give a lora_rank and"):
        load_recipe(path, changes)


def test_without_bitsandbytes_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match=r"lora_base: nf4 needs bitsandbytes \(.+\); .*pip install 'llava-kd\[qlora\]'"):
        NF4Linear(linear(4, 16), CPU)


def tree(tiny) -> dict:
    """The second of three stages has its base in 4 bits; tower and projector learn beside the updates."""
    tree = tiny.tree()
    tree["stages"][1] |= {"train": ["vision_tower", "projector", "language_model"], "learning_rate": 1.0e-2}
    tree["stages"][1] |= {"lora_rank": RANK, "lora_base": "nf4", "losses": tree["stages"][2]["losses"]}
    return tree


@pytest.fixture(scope="module")
def run(tiny, command, tmp_path_factory):
    """A finished run of it."""
    folder = tmp_path_factory.mktemp("nf4")
    done = command("train", tiny.recipe(folder / "recipe.yaml", tree(tiny)), "--out", folder / "run")
    assert done.code == 0, done.err
    return folder


def weights_of(run, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "model" / "model.safetensors")


def losses_of(run, stage: str) -> list[dict]:
    return [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]


def test_a_stage_leaves_a_plain_float32_model_of_the_rounded_base_and_the_updates(run):
    before, after = (weights_of(run / "run", stage) for stage in ("dpt", "sft"))
    assert before.keys() == after.keys()
    assert {values.dtype for values in after.values()} == {torch.float32}
    for name, values in after.items():
        text = "language_model" in name or "lm_head" in name
        if text and "_proj.weight" in name:
            sizes = torch.linalg.svdvals((values - rounded(before[name])).double())
            assert sizes[RANK - 1] > 1e-4 * sizes[0]
            assert sizes[RANK] < 1e-4 * sizes[0]
        elif text:
            assert torch.equal(values, before[name])
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("vision_tower" in name for name in changed)
    assert sum("multi_modal_projector" in name for name in changed) == 4
    folder = run / "run" / "sft" / "model"
    model, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")


def test_losses_fall_and_the_next_stage_goes_on_from_there(run):
    lines = losses_of(run / "run", "sft")
    for part in ("loss", "ce", "response_kl", "visual_kl", "relation"):
        assert lines[-1][part] < lines[0][part], part
    after = losses_of(run / "run", "dft")
    assert after[0]["loss"] == pytest.approx(lines[-1]["loss"], rel=0.2)


def test_a_checkpoint_holds_what_learns_and_a_stage_goes_on_from_it_to_the_same_weights(run, command, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    place = tmp_path / "copy" / "run"
    ledger = json.loads((place / "pipeline.json").read_text())
    stage = {key: ledger["stages"][1][key] for key in ("name", "fingerprint")} | {"state": "running"}
    (place / "pipeline.json").write_text(json.dumps(ledger | {"stages": [ledger["stages"][0], stage]}))
    older, newest = sorted((place / "sft" / "checkpoints").iterdir(), key=lambda path: int(path.name[5:]))
    names = set(load_file(older / "learning.safetensors"))
    assert sum(".lora_" in name for name in names) == 2 * 7 * 2
    assert all("vision_tower" in name or "projector" in name or ".lora_" in name for name in names)
    for folder in (newest, place / "sft" / "model", place / "dft"):
        shutil.rmtree(folder)
    done = command("train", tmp_path / "copy" / "recipe.yaml", "--out", place)
    assert done.code == 0, done.err
    assert "resuming after step" in done.err
    for name in ("sft", "dft"):
        one, other = weights_of(run / "run", name), weights_of(place, name)
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_in_bf16_with_layers_computed_twice_and_packs_the_losses_are_those_of_fp32(run, tiny, command, tmp_path):
    other = tree(tiny) | {"precision": "bf16", "gradient_checkpointing": True}
    other["stages"][1]["max_tokens_per_batch"] = 800
    del other["stages"][2]
    done = command("train", tiny.recipe(tmp_path / "recipe.yaml", other), "--out", tmp_path / "run")
    assert done.code == 0, done.err
    here, there = losses_of(tmp_path / "run", "sft"), losses_of(run / "run", "sft")
    assert here[0]["loss"] == pytest.approx(there[0]["loss"], rel=0.05)
    assert here[-1]["loss"] == pytest.approx(there[-1]["loss"], rel=0.1)
