"""What is decayed, and how the learning rate moves."""

import itertools
import math

import pytest
import torch
from torch import nn

from llavakd.config import LossConfig, StageConfig
from llavakd.train.step import build_optimizer, learning_rate, set_learning_rate


def stage(**changes) -> StageConfig:
    whole = {"name": "s", "data": "d", "train": ("projector",), "losses": LossConfig(ce=1.0), "global_batch_size": 8}
    return StageConfig(**(whole | {"learning_rate": 2.0e-3} | changes))


def test_matrices_are_decayed_vectors_are_not_and_frozen_tensors_are_left_out():
    module = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    optimizer = build_optimizer(module, stage(weight_decay=0.1, betas=(0.8, 0.9)))
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [id(p) for p in decayed["params"]] == [id(module[0].weight)]
    assert {id(p) for p in plain["params"]} == {id(module[0].bias), id(module[1].weight), id(module[1].bias)}
    assert all(group["betas"] == (0.8, 0.9) and group["lr"] == 2.0e-3 for group in optimizer.param_groups)


def test_a_module_without_learning_vectors_gets_one_group():
    (group,) = build_optimizer(nn.Linear(3, 4, bias=False), stage()).param_groups
    assert len(group["params"]) == 1


def test_the_rate_climbs_in_a_line_and_falls_as_a_cosine_to_zero():
    form = stage(learning_rate=1.0, warmup_ratio=0.1)
    curve = [learning_rate(step, steps=100, stage=form) for step in range(101)]
    assert curve[:11] == pytest.approx([step / 10 for step in range(11)])
    assert curve[10] == max(curve) == 1.0
    assert curve[55] == pytest.approx(0.5)
    assert curve[77] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * 67 / 90))
    assert curve[100] == pytest.approx(0.0, abs=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(curve[10:]))


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert learning_rate(0, steps=7, stage=stage(warmup_ratio=0.0)) == 2.0e-3


def test_a_share_of_a_step_is_one_step_of_warm_up():
    assert [learning_rate(step, steps=20, stage=stage()) for step in (0, 1)] == [0.0, 2.0e-3]


def test_setting_the_rate_reaches_every_group():
    optimizer = build_optimizer(nn.Linear(3, 4), stage())
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
