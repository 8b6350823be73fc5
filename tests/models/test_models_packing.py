"""Rows of a pack do not see one another, in every family of language models and both kinds of attention."""

import copy

import pytest
import torch
from model_parts import LANGUAGE_MODELS, VISION
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakd.models.student import final_hidden

TOKENS = 16  # of a picture
FAMILIES = ["qwen2", "qwen3", "llama", "mistral", "gemma", "gemma3", "phi3", "phi"]
# Of each row: whether each position is a picture's; one token, two pictures, none.
ROWS = [[0] * 3 + [1] * TOKENS + [0] * 5, [0], [1] * TOKENS + [0] * 2 + [1] * TOKENS + [0] * 3, [0] * 7, [0, 0]]


def model_of(family: str, attention: str):
    """With a sliding window, where the family has one, that ends inside the longer rows."""
    text = copy.deepcopy(LANGUAGE_MODELS[family])
    if family in ("mistral", "phi3"):
        text.sliding_window = 5
    if family == "gemma3":
        text.sliding_window, text.layer_types = 5, ["sliding_attention", "full_attention"]
    vision = {"model_type": "siglip_vision_model"} | VISION
    config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=TOKENS)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).double().eval()


def inputs_of(seed: int):
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(2, 16, (len(row),), generator=generator) for row in ROWS]
    pictures = [torch.randn(sum(row) // TOKENS, TOKENS, 16, generator=generator, dtype=torch.float64) for row in ROWS]
    return ids, [torch.tensor(row, dtype=torch.bool) for row in ROWS], pictures


def packed(model, ids, visual, pictures):
    positions = torch.cat([torch.arange(len(row)) for row in ids])[None]
    line, seen = torch.cat(ids)[None], torch.cat(visual)[None]
    hidden = final_hidden(model, line, torch.ones_like(line), seen, torch.cat(pictures), positions)
    return hidden[0].split([len(row) for row in ids])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_pack_is_what_it_is_alone(family, attention):
    model, (ids, visual, pictures) = model_of(family, attention), inputs_of(0)
    found = packed(model, ids, visual, pictures)
    for number, hidden in enumerate(found):
        line, features = ids[number][None], pictures[number] if len(pictures[number]) else None
        alone = final_hidden(model, line, torch.ones_like(line), visual[number][None], features)[0]
        # The softmax of eager attention is float32.
        torch.testing.assert_close(hidden, alone, rtol=0, atol=1e-5 if attention == "eager" else 1e-12)
    assert found[0].std() > 0.1  # not all alike


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_another_neighbour_changes_no_bit_of_a_row(family, attention):
    model, (ids, visual, pictures) = model_of(family, attention), inputs_of(0)
    before = packed(model, ids, visual, pictures)
    others, _, other_pictures = inputs_of(1)
    for changed in range(len(ROWS)):
        mixed = [others[n] if n == changed else ids[n] for n in range(len(ROWS))]
        shown = [other_pictures[n] if n == changed else pictures[n] for n in range(len(ROWS))]
        after = packed(model, mixed, visual, shown)
        for number in range(len(ROWS)):
            assert torch.equal(before[number], after[number]) == (number != changed)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_stay_inside_a_row_also_where_layers_are_made_again(family):
    model, (ids, visual, pictures) = model_of(family, "sdpa").train(), inputs_of(0)
    grads = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable()
        shown = [picture.clone().requires_grad_(True) for picture in pictures]
        packed(model, ids, visual, shown)[2].square().sum().backward()
        assert [bool(one.grad is not None and one.grad.any()) for one in shown] == [n == 2 for n in range(len(ROWS))]
        grads.append(shown[2].grad)
    assert torch.equal(*grads)
