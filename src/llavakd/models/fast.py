"""What makes the models fast: no tower layers that nothing reads; on a GPU flash attention without a mask, compiled layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

_NAME = "llavakd_rows"
_KEPT = 0.8  # share of its activations that a compiled layer keeps; benchmarks/results/step.json
_LONGEST = 2**14  # numbers of a row that a reduction holds at once, to read them once; inductor's own limit is 1,024


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it, of padded rows [B, H, T, D], or of a pack [1, H, T, D] of rows.

    No mask: padding stands on the right, where no token sees it; a pack's rows, from `cu_seq_lens_q` (int32, with both
    ends) to the next and at most `max_length_q` tokens long, do not see one another.
    """
    if (starts := how.get("cu_seq_lens_q")) is None:
        return sdpa_attention_forward(module, query, key, value, None, **how)
    groups = query.shape[1] // key.shape[1]
    heads = query, repeat_kv(key, groups), repeat_kv(value, groups)
    query, key, value = (one.squeeze(0).transpose(0, 1).to(value.dtype) for one in heads)  # the rotation leaves float32
    ends = starts, starts, how["max_length_q"], how["max_length_q"]
    attended: Any = varlen_attn(query, key, value, *ends, scale=how["scaling"], window_size=(-1, 0))
    return attended.unsqueeze(0), None


def attend_by_rows(model: LlavaForConditionalGeneration) -> None:
    """Let the language model use `attend`, where all its layers see everything before them, in half precision on a GPU."""
    text = model.config.get_text_config()
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if set(kinds) == {"full_attention"} and not getattr(text, "attn_logit_softcapping", None):
        AttentionInterface.register(_NAME, attend)
        model.model.language_model.set_attn_implementation(_NAME)


class _GeluLinear(nn.Linear):
    """A layer [..., K] -> [..., N] that never learns, and GELU (tanh form) of its float32 sums in the same kernel of a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
        return y.unflatten(0, x.shape[:-1])


def trim_tower(model: LlavaForConditionalGeneration) -> None:
    """Let tower layers behind the one that is read hand on what they get; in half precision GELU comes with its product."""
    tower, read = model.model.vision_tower, model.config.vision_feature_layer
    layers: Any = next(part for part in tower.modules() if isinstance(part, nn.ModuleList))
    for layer in layers[range(len(layers) + 1)[read] :]:
        layer.forward = lambda hidden, *_, **__: hidden
    if tower.dtype != torch.float32 and tower.device.type == "cuda" and tower.config.hidden_act == "gelu_pytorch_tanh":
        for layer in layers:
            layer.mlp.fc1.__class__, layer.mlp.activation_fn = _GeluLinear, nn.Identity()


def compile_layers(student: nn.Module, *others: nn.Module, **options: Any) -> None:
    """Compile each layer of all towers and language models, with torch.compile's options; equal layers share the result."""
    from torch._inductor import choices, config, virtualized  # takes a second: only where something is compiled

    handler: Any = choices.InductorChoices()
    usual = handler.should_use_persistent_reduction

    def fits(features: Any, cooperative_reduction: bool) -> bool:
        short = virtualized.V.graph.sizevars.statically_known_leq(features.reduction_numel, _LONGEST)
        return (short and features.get_reduction_hint().name == "INNER") or usual(features, cooperative_reduction)

    handler.should_use_persistent_reduction = fits
    virtualized.V.set_choices_handler(handler)
    config.comprehensive_padding = False  # a tower's 4,304 columns would become 4,352, and its bias leave the product
    torch._dynamo.config.skip_fsdp_guards = False  # or a sharded layer's sizes are variables, and kernels slow (2.11)
    torch.compiler.reset()  # what an earlier stage compiled counts against a limit
    # Those of a language model that learns make the activations that they do not keep again, the cheapest first.
    learns = any(weight.requires_grad for weight in student.get_submodule("model.language_model").parameters())
    torch._functorch.config.activation_memory_budget = _KEPT if learns else 1.0
    modules = (one for model in (student, *others) for one in model.modules())
    for layer in (layer for stack in modules if isinstance(stack, nn.ModuleList) for layer in stack):
        layer.compile(**options)
