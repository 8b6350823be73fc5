"""One of two processes: numbers that it holds of a placed student and teacher; run as SCRIPT SHARDING RECIPE."""

import json
import sys
from pathlib import Path

from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from llavakd.config import load_recipe
from llavakd.models.student import build_student, load_teacher
from llavakd.train.placement import place
from llavakd.train.step import StudentModule, build_optimizer


def held(module: nn.Module) -> int:
    """Numbers in this process's memory."""
    weights = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in module.parameters()]
    return sum(weight.numel() for weight in weights)


def main() -> None:
    """One line of JSON."""
    recipe = load_recipe(Path(sys.argv[2]))
    student, teacher = build_student(recipe.student, seed=0), load_teacher(recipe.teacher)
    stage = recipe.stages[-1]
    student.train_only(stage.learns)
    tower, *parts = [held(part) for part in (student.parts()["vision_tower"], student.model, teacher.model)]
    layers = held(teacher.parts()["language_model"].layers)
    accelerator = Accelerator(cpu=True)
    module = place(accelerator, StudentModule(student, stage, None), teacher.model, sys.argv[1])
    learning = build_optimizer(module, stage).param_groups
    moving = sum(held(nn.ParameterList(group["params"])) for group in learning)
    told = {"tower": tower, "layers": layers, "whole": parts, "moving": moving}
    print(json.dumps(told | {"held": [held(student.model), held(teacher.model)]}))
    accelerator.end_training()


if __name__ == "__main__":
    main()
