"""A tower without the layers that nothing reads gives the same features and gradients."""

import copy
from types import SimpleNamespace

import pytest
import torch
from model_parts import LANGUAGE_MODELS, TOWERS
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakd import pipeline
from llavakd.config import parse_recipe
from llavakd.models.fast import trim_tower
from llavakd.models.student import vision_features

LAYERS = 4


def model_of(tower: str, layer: int) -> LlavaForConditionalGeneration:
    vision = copy.deepcopy(TOWERS[tower])
    vision.num_hidden_layers = LAYERS
    text = copy.deepcopy(LANGUAGE_MODELS["qwen2"])
    config = LlavaConfig(vision_config=vision, text_config=text, vision_feature_layer=layer)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config).eval()


def layers_of(model: LlavaForConditionalGeneration) -> nn.ModuleList:
    return next(part for part in model.model.vision_tower.modules() if isinstance(part, nn.ModuleList))


@pytest.mark.parametrize("layer", [-1, -2, -3, -LAYERS - 1, 0, 1, LAYERS])
@pytest.mark.parametrize("tower", ["siglip", "clip", "dinov2", "dinov2-registers"])
def test_features_and_gradients_stay_to_the_bit_and_later_layers_do_not_run(tower, layer):
    found = []
    for trimmed in (False, True):
        model, ran = model_of(tower, layer), []
        if trimmed:
            trim_tower(model)
        for number, each in enumerate(layers_of(model)):
            children = [part for part in each.modules() if isinstance(part, nn.Linear)]
            children[0].register_forward_hook(lambda *_, number=number, ran=ran: ran.append(number))
        size = model.config.vision_config.image_size
        torch.manual_seed(1)
        pixels = torch.randn(2, 3, size, size, requires_grad=True)
        features = vision_features(model, pixels)
        torch.manual_seed(2)
        (features * torch.randn(features.shape)).sum().backward()
        grads = {name: weight.grad for name, weight in model.model.vision_tower.named_parameters()}
        found.append((features, pixels.grad, grads, ran, [*model.state_dict()]))
    (whole, whole_pixels, whole_grads, all_ran, keys), (cut, pixels, grads, ran, cut_keys) = found
    assert torch.equal(cut, whole)
    assert torch.equal(pixels, whole_pixels)
    assert keys == cut_keys
    assert all_ran == list(range(LAYERS))
    assert ran == list(range(range(LAYERS + 1)[layer]))
    for name, grad in whole_grads.items():
        assert (grads[name] is None) == (grad is None), name
        assert grad is None or torch.equal(grads[name], grad), name


def test_a_stage_trims_both_towers():
    student, teacher = model_of("siglip", -2), model_of("siglip", -3)
    accelerator = SimpleNamespace(device=SimpleNamespace(type="cpu"), mixed_precision="no")
    models = {"student": SimpleNamespace(model=student), "teacher": SimpleNamespace(model=teacher)}
    recipe = SimpleNamespace(precision="fp32", compile=False, gradient_checkpointing=False)
    pipeline._make_fast(recipe, SimpleNamespace(**models, accelerator=accelerator, pair=None, stage=None))
    hidden = torch.randn(1, 3, 16)
    for model, left in ((student, 3), (teacher, 2)):
        passed = [layer(hidden, None) is hidden for layer in layers_of(model)]
        assert passed == [False] * left + [True] * (LAYERS - left)


def test_features_for_the_disk_are_made_by_a_trimmed_tower(tiny, tmp_path, monkeypatch):
    cut, usual = [], pipeline.students.vision_features

    def features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
        cut.append(["forward" in vars(layer) for layer in layers_of(model)])
        return usual(model, pixels)

    monkeypatch.setattr(pipeline.students, "vision_features", features)
    tree = tiny.tree() | {"cache_features": True}
    tree["stages"] = [tree["stages"][1] | {"epochs": 0.2}]
    pipeline.run_pipeline(parse_recipe(tree), tmp_path)
    assert cut
    assert {tuple(layers) for layers in cut} == {(False, True)}
