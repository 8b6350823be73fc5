"""Attention without a mask and compiled layers compute what stock models do."""

import copy
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from model_parts import LANGUAGE_MODELS, VISION
from sympy import sympify
from torch import distributed, nn
from torch._inductor import config as inductor
from torch._inductor import virtualized
from torch._inductor.runtime.hints import ReductionHint
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakd import pipeline
from llavakd.config import load_recipe
from llavakd.models.fast import attend_by_rows, compile_layers
from llavakd.models.student import final_hidden, load_student


def model_of(family: str, **changes) -> LlavaForConditionalGeneration:
    text = copy.deepcopy(LANGUAGE_MODELS[family])
    for name, value in changes.items():
        setattr(text, name, value)
    config = LlavaConfig(vision_config={"model_type": "siglip_vision_model"} | VISION, text_config=text)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").double().eval()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "gemma", "phi"])
def test_padded_rows_need_no_mask_and_padding_gets_no_gradient(family):
    model = model_of(family)
    rows = [torch.randint(2, 16, (length,)) for length in (9, 4, 1)]
    ids, mask = (pad_sequence(each, batch_first=True) for each in (rows, [torch.ones_like(row) for row in rows]))
    none = torch.zeros_like(ids, dtype=torch.bool)
    wanted = final_hidden(model, ids, mask, none, None)
    attend_by_rows(model)
    seen = []
    model.model.language_model.layers[0].register_forward_pre_hook(
        lambda _, args, given: seen.append((args[0].requires_grad_(True), given.get("attention_mask"))),
        with_kwargs=True,
    )
    found = final_hidden(model, ids, mask, none, None)
    for row, (one, other) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(one[: len(rows[row])], other[: len(rows[row])], rtol=0, atol=1e-12)
    (embedded, given), live = seen[0], mask.bool()
    assert given is None
    (grad,) = torch.autograd.grad(found[live].square().sum(), embedded)
    assert grad[live].abs().min() > 0
    assert not grad[~live].any()


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float32, "sdpa"), (torch.bfloat16, "llavakd_rows")])
def test_a_float32_teacher_keeps_its_attention_for_the_kernels_of_packs_take_none(dtype, kind):
    student, teacher = model_of("qwen2").float(), model_of("qwen2").to(dtype)
    accelerator = SimpleNamespace(device=SimpleNamespace(type="cuda"), mixed_precision="bf16")
    models = {"student": SimpleNamespace(model=student), "teacher": SimpleNamespace(model=teacher)}
    recipe = SimpleNamespace(precision="bf16", compile=False, gradient_checkpointing=False)
    pipeline._make_fast(recipe, SimpleNamespace(**models, accelerator=accelerator, pair=None, stage=None))
    assert student.model.language_model.config._attn_implementation == "llavakd_rows"
    assert teacher.model.language_model.config._attn_implementation == kind


@pytest.mark.parametrize(
    ("family", "changes"), [("gemma3", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]})]
)
def test_layers_that_do_not_see_all_before_them_keep_their_attention(family, changes):
    model = model_of(family, **changes)
    attend_by_rows(model)
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_a_compiled_stage_learns_what_it_learns_uncompiled(tiny, tmp_path, monkeypatch):
    calls = []

    def backend(graph, _inputs):
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(pipeline, "compile_layers", functools.partial(compile_layers, backend=backend))
    tree = tiny.tree()
    found, weights, stage = [], [], tree["stages"][0]["name"]
    for name in ("false", "true"):
        out = tmp_path / name
        recipe = load_recipe(tiny.recipe(tmp_path / f"{name}.yaml", tree), [f"compile={name}", "evaluation=null"])
        pipeline.run_pipeline(recipe, out)
        assert bool(calls) == (name == "true")
        found.append([json.loads(line)["loss"] for line in (out / stage / "metrics.jsonl").open(encoding="utf-8")])
        weights.append(dict(load_student(str(out / stage / "model")).model.named_parameters()))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_compiled_reduction_holds_rows_of_16384_numbers_and_columns_are_not_padded():
    compile_layers(model_of("qwen2"), backend="eager")
    sizes = SimpleNamespace(statically_known_leq=lambda size, most: size <= most)
    with virtualized.V.set_graph_handler(SimpleNamespace(sizevars=sizes)):
        for size, hint, held in [
            (900, ReductionHint.INNER, True),
            (2**14, ReductionHint.INNER, True),
            (2**14 + 1, ReductionHint.INNER, False),
            (900, ReductionHint.OUTER, False),
        ]:
            features = SimpleNamespace(reduction_numel=sympify(size), get_reduction_hint=lambda hint=hint: hint)
            assert virtualized.V.choices.should_use_persistent_reduction(features, False) == held, (size, hint)
    assert not inductor.comprehensive_padding


def test_all_layers_of_both_parts_are_compiled():
    model = model_of("qwen2")
    compile_layers(model, backend="eager")
    layers = [*model.model.vision_tower.modules(), *model.model.language_model.modules()]
    stacks = [module for module in layers if isinstance(module, nn.ModuleList)]
    assert len(stacks) == 2
    assert all(layer._compiled_call_impl is not None for stack in stacks for layer in stack)


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_sizes_of_a_sharded_layer_are_constants_beside_a_wider_teacher(alone):
    student, teacher = model_of("qwen2").float(), model_of("qwen2", hidden_size=32, head_dim=16).float()
    for layer in student.model.language_model.layers:
        fully_shard(layer, mesh=alone)
    graphs = []

    def backend(graph, inputs):
        graphs.append([type(given) for given in inputs])
        return graph.forward

    compile_layers(student, teacher, backend=backend)
    ids = torch.randint(2, 16, (2, 5))
    for model in (teacher, student):
        final_hidden(model, ids, torch.ones_like(ids), torch.zeros_like(ids, dtype=torch.bool), None)
    assert len(graphs) >= 2
    assert not any(issubclass(kind, int | torch.SymInt) for kinds in graphs for kind in kinds)
