"""One of two processes: numbers that it holds of a placed student and teacher; run as SCRIPT SHARDING RECIPE."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from torch import distributed, nn
from torch.distributed.tensor import DTensor

from llavakd.config import load_recipe
from llavakd.models.student import build_student, load_teacher
from llavakd.train.placement import place
from llavakd.train.step import StudentModule
from llavakd.train.zero import ZeroAdamW


def held(module: nn.Module) -> int:
    """Numbers in this process's memory, without those that even out ZeRO-3's shards."""
    return sum(map(own, module.parameters()))


def own(weight: nn.Parameter) -> int:
    """Of one weight."""
    if not hasattr(weight, "ds_id"):
        return (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
    assert weight.numel() == 0, "ZeRO-3 has let go of the whole"
    part, rank = weight.ds_tensor.numel(), distributed.get_rank()
    return max(0, min(part, weight.ds_numel - rank * part))


def main() -> None:
    """One line of JSON."""
    recipe = load_recipe(Path(sys.argv[2]))
    student, teacher = build_student(recipe.student, seed=0), load_teacher(recipe.teacher)
    stage = recipe.stages[-1]
    student.train_only(stage.learns)
    tower, *parts = [held(part) for part in (student.parts()["vision_tower"], student.model, teacher.model)]
    layers = held(teacher.parts()["language_model"].layers)
    accelerator = Accelerator(cpu=True)
    _, optimizer = place(accelerator, StudentModule(student, stage, None), teacher.model, stage, sys.argv[1])
    if isinstance(optimizer, ZeroAdamW):
        moving = sum(moments["exp_avg"].numel() for moments in optimizer.shards.values())
    else:
        moving = sum(held(nn.ParameterList(group["params"])) for group in optimizer.param_groups)
    told = {"tower": tower, "layers": layers, "whole": parts, "moving": moving}
    placed = nn.ModuleList([*student.parts().values(), student.model.lm_head])  # of which DeepSpeed knows no frozen tower
    print(json.dumps(told | {"held": [held(placed), held(teacher.model)]}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
