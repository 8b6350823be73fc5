"""What `llava-kd plan` says beside real steps at true size: peak memory and FLOPs of three stages, weights at random.

    python benchmarks/plan_measured.py --out benchmarks/results/plan_measured.json     # on a GPU of 80 GB or more

Every row is 928 tokens: 728 visual ones, 200 of text, half of them answered. The models are stock ones, with both towers on the
GPU and a mask: the trainer's own take less memory, beside which plan_step.py puts the plan's.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from plan_llava_kd import RECIPES, local, write_configs
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlavaForConditionalGeneration

from llavakd.config import Recipe, StageConfig, load_recipe
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch
from llavakd.models.alignment import Pair
from llavakd.models.student import VisionLanguageModel, student_config
from llavakd.plan import plan_run
from llavakd.train.step import StudentModule, TrainState, build_optimizer, train_step
from losses import environment

VISUAL, TEXT, BEFORE = 728, 200, 20  # tokens of the picture, of all text, and of the text before the picture
CASES = [  # recipe, stage, rows on the GPU, gradient checkpointing
    ("qwen2.5-0.5b", "dpt", 8, False),
    ("qwen2.5-0.5b", "dft", 8, False),
    ("qwen1.5-1.8b", "dft", 8, True),
]


def product_flops(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
    """Of mm, bmm, addmm and baddbmm; torch's own count fails where they are told an `out_dtype`."""
    *_, left, right = [shape for shape in shapes if isinstance(shape, torch.Size | list | tuple)]
    return 2 * math.prod(left) * right[-1]


PRODUCTS = dict.fromkeys(
    (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.baddbmm), product_flops
)


def one_stage(folder: Path, name: str, stage: str, rows: int, checkpointing: bool, *more: str) -> Recipe:
    """The recipe, its stage as one micro-batch of `rows`; `more` are overrides, which come last."""
    changes = [f"stages.{stage}.global_batch_size={rows}", f"stages.{stage}.micro_batch_size={rows}"]
    changes += [f"data.{source}.max_length={VISUAL + TEXT}" for source in ("pretrain", "instruct")]
    changes.append(f"gradient_checkpointing={str(checkpointing).lower()}")
    return load_recipe(RECIPES / f"{name}.yaml", [*local(folder, name), *changes, *more])


def whole(config: Any, dtype: torch.dtype, device: str = "cuda") -> VisionLanguageModel:
    """A model of random weights on the device."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    return VisionLanguageModel(model=model.to(dtype), tokenizer=None, image_processor=None)  # type: ignore[arg-type]


def stage_of(recipe: Recipe, name: str) -> StageConfig:
    """The stage of this name."""
    return next(stage for stage in recipe.stages if stage.name == name)


def state_of(recipe: Recipe, stage_name: str) -> TrainState:
    """What the pipeline would train with."""
    stage = stage_of(recipe, stage_name)
    teacher = whole(AutoConfig.from_pretrained(recipe.teacher.path), torch.bfloat16)  # type: ignore[union-attr]
    teacher.model.requires_grad_(False).eval()
    student = whole(student_config(recipe.student), torch.float32)
    if recipe.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    return prepared(stage, student, teacher, vocab_size=151_665)


def prepared(
    stage: StageConfig, student: VisionLanguageModel, teacher: VisionLanguageModel | None, *, vocab_size: int
) -> TrainState:
    """Models made ready for a stage, as the pipeline does it in bf16."""
    student.train_only(stage.train)
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16")
    module = StudentModule(student, stage, vocab_size)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, stage))
    student.model.train()
    given = {"accelerator": accelerator, "module": module, "optimizer": optimizer, "student": student}
    pair = Pair(vocab_size=vocab_size, shared_tower=True, note="")
    return TrainState(**given, teacher=teacher, pair=pair if teacher else None, stage=stage)


def batch_of(
    rows: int,
    response: int,
    *,
    visual: int = VISUAL,
    text: int = TEXT,
    image: int = 384,
    vocabulary: int = 151_000,
    padding: int = 1,
) -> Batch:
    """Random rows with one picture each, after BEFORE tokens; the first row ends in padding."""
    ids = torch.randint(10, vocabulary, (rows, visual + text))
    segments = torch.full(ids.shape, int(Segment.PROMPT), dtype=torch.uint8)
    segments[:, BEFORE : BEFORE + visual] = int(Segment.VISUAL)
    segments[:, -response:] = int(Segment.RESPONSE)
    segments[0, visual + text - padding :] = int(Segment.PADDING)
    return Batch(
        input_ids=ids,
        attention_mask=(segments != Segment.PADDING).long(),
        labels=ids.where(segments == Segment.RESPONSE, -100),
        segments=segments,
        visual=segments == Segment.VISUAL,
        image_rows=torch.arange(rows),
        pixel_values=torch.randn(rows, 3, image, image),
    )


def measure(recipe: Recipe, stage_name: str, rows: int) -> dict[str, Any]:
    """Planned and measured bytes at the peak and FLOPs of one step."""
    plan = plan_run(recipe, rows=1024, text_tokens=TEXT)
    planned = next(stage for stage in plan["stages"] if stage["name"] == stage_name)
    state = state_of(recipe, stage_name)
    batch = batch_of(rows, round(planned["tokens"]["response"]))
    train_step(state, [batch], step=0)  # makes W^T W of frozen heads and the optimiser's states
    torch.cuda.reset_peak_memory_stats()
    train_step(state, [batch], step=1)
    peak = torch.cuda.max_memory_allocated()
    with FlopCounterMode(display=False, custom_mapping=PRODUCTS) as counter:
        train_step(state, [batch], step=2)
    told = {
        "peak_gib": {"planned": planned["memory"]["peak"] / 2**30, "measured": peak / 2**30},
        "tflop": {
            "planned": sum(planned["flops"].values()) / planned["steps"] / 1e12,
            "measured": counter.get_total_flops() / 1e12,
        },
    }
    for pair in told.values():
        pair["planned / measured"] = pair["planned"] / pair["measured"]
    return told


def main() -> None:
    """Every case in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: dict = {"environment": environment("cuda"), "cases": []}
    with tempfile.TemporaryDirectory() as folder:
        write_configs(Path(folder))
        for name, stage, rows, checkpointing in CASES:
            case = {"recipe": name, "stage": stage, "rows": rows, "gradient_checkpointing": checkpointing}
            case |= measure(one_stage(Path(folder), name, stage, rows, checkpointing), stage, rows)
            torch.cuda.empty_cache()
            print(case, flush=True)
            found["cases"].append(case)
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
