"""On a GPU: rows of a pack through flash kernels, and padded rows without a mask, beside each row alone."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavakd.models.fast import attend_by_rows, compile_layers
from llavakd.models.student import final_hidden

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
TOKENS, LENGTHS = 16, [300, 20, 131, 64]  # of a picture; of the rows, each with one picture from its third token on


def model_of(kind: str):
    text = {"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "image_size": 56}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_seq_length=TOKENS)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").cuda().bfloat16()
    if kind != "stock":
        attend_by_rows(model)
        assert model.model.language_model.config._attn_implementation != "sdpa"
    if kind == "compiled":
        compile_layers(model)
    return model


def weighed(row: torch.Tensor, number: int) -> torch.Tensor:
    """A sum whose gradient the last norm does not take away, as it does that of squares."""
    torch.manual_seed(100 + number)
    return (row.float() * torch.randn(row.shape).cuda()).sum()


def rows_of() -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(1)
    ids = [torch.randint(100, (length,)) for length in LENGTHS]
    visual = [torch.zeros(length, dtype=torch.bool) for length in LENGTHS]
    for one in visual:
        one[2 : 2 + TOKENS] = True
    return ids, visual, torch.randn(len(LENGTHS), TOKENS, 32, device="cuda")


def through(model, ids, visual, features, positions=None, mask=None) -> torch.Tensor:
    features = features.clone().requires_grad_(True)
    mask = torch.ones_like(ids) if mask is None else mask
    hidden = final_hidden(model, ids, mask, visual, features.bfloat16(), positions)
    return hidden, features


def alone() -> tuple[list[torch.Tensor], torch.Tensor]:
    """Hidden states of each row by itself, stock, and the gradient of a weighed sum to the features."""
    model, (ids, visual, features) = model_of("stock"), rows_of()
    found = [through(model, ids[n][None], visual[n][None], features[n : n + 1]) for n in range(len(ids))]
    grads = [torch.autograd.grad(weighed(hidden[0], n), leaf)[0] for n, (hidden, leaf) in enumerate(found)]
    return [hidden[0].detach().float() for hidden, _ in found], torch.cat(grads)


@pytest.mark.parametrize("kind", ["by rows", "compiled"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_rows_together_are_what_each_is_alone(kind, layout):
    wanted, wanted_grad = alone()
    model, (ids, visual, features) = model_of(kind), rows_of()
    if layout == "packed":
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        hidden, leaf = through(model, torch.cat(ids)[None], torch.cat(visual)[None], features, positions)
        rows = hidden[0].split(LENGTHS)
    else:
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(one) for one in ids], batch_first=True)
        hidden, leaf = through(model, pad(ids, batch_first=True), pad(visual, batch_first=True), features, mask=mask)
        rows = [hidden[n, :length] for n, length in enumerate(LENGTHS)]
    grad = torch.autograd.grad(sum(weighed(row, n) for n, row in enumerate(rows)), leaf)[0]
    pairs = [*zip(rows, wanted, strict=True), *zip(grad, wanted_grad, strict=True)]
    for number, (got, want) in enumerate(pairs):
        error = float((got.float() - want).detach().norm() / want.norm())
        assert error < 0.03, f"part {number}: {error:.3f}"
