"""distill_rows_topk against float64 formulas on the k + 1 outcomes, and its limits at k = V."""

from __future__ import annotations

import itertools

import pytest
import torch
from losses_oracle import IGNORE, assert_near, double, kl64, row_ce64, softmax64

from llavakd.losses import distill_rows, distill_rows_topk

N, D, V, SHARED = 23, 13, 47, 41


def inputs(k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator) / 2
    teacher = torch.randn(N, SHARED, generator=generator, dtype=torch.float64) * 2
    logp, ids = teacher.log_softmax(-1).topk(k)
    order = torch.randperm(k, generator=generator)  # nothing may rest on their being sorted
    labels = torch.randint(SHARED, (N,), generator=generator)
    labels[::4] = IGNORE
    ce_weight, kl_weight = (torch.rand(N, generator=generator) for _ in range(2))
    kl_weight[1::3] = 0
    return {
        "student_hidden": hidden.to(dtype).requires_grad_(True),
        "student_head": head.to(dtype).requires_grad_(True),
        "teacher_ids": ids[:, order],
        "teacher_logp": logp[:, order],
        "labels": labels,
        "ce_weight": ce_weight,
        "kl_weight": kl_weight,
    }


def oracle(given: dict, tail: str) -> tuple[torch.Tensor, tuple]:
    hidden, head = double(given["student_hidden"]), double(given["student_head"])
    total = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        if given["labels"][i] != IGNORE:
            total = total + given["ce_weight"][i] * row_ce64(hidden[i], head, int(given["labels"][i]), SHARED)
        if given["kl_weight"][i] == 0:
            continue
        q = softmax64(head[:SHARED] @ hidden[i])
        ids, p = given["teacher_ids"][i].tolist(), given["teacher_logp"][i].double().exp()
        others = [v for v in range(SHARED) if v not in ids]
        if tail == "renormalize":
            distance = kl64(p / p.sum(), q[ids])
        elif others:
            distance = kl64(torch.cat([p, 1 - p.sum()[None]]), torch.cat([q[ids], q[others].sum()[None]]))
        else:
            distance = kl64(p, q[ids])
        total = total + given["kl_weight"][i] * distance
    return total, torch.autograd.grad(total, [hidden, head])


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("k", [1, 5, SHARED - 1, SHARED])
def test_value_and_gradient_equal_the_formula(k, tail):
    given = inputs(k)
    got = distill_rows_topk(**given, tail=tail, vocab_size=SHARED, chunk_rows=7)
    want, grads = oracle(given, tail)
    assert_near(got.ce + got.kl, want)
    mine = torch.autograd.grad(got.ce + got.kl, [given["student_hidden"], given["student_head"]])
    for grad, wanted in zip(mine, grads, strict=True):
        assert_near(grad, wanted)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_with_the_whole_vocabulary_it_is_the_loss_with_the_teacher_present(tail):
    given = inputs(SHARED)
    logits = torch.zeros(N, SHARED).scatter(1, given["teacher_ids"], given["teacher_logp"].float())
    got = distill_rows_topk(**given, tail=tail, vocab_size=SHARED)
    leaves = {name: given[name] for name in ("student_hidden", "student_head", "labels", "ce_weight", "kl_weight")}
    want = distill_rows(teacher_hidden=logits, teacher_head=torch.eye(SHARED), vocab_size=SHARED, **leaves)
    assert_near(got.kl_rows, want.kl_rows)
    wanted = [given["student_hidden"], given["student_head"]]
    for one, other in zip(
        torch.autograd.grad(got.ce + got.kl, wanted), torch.autograd.grad(want.ce + want.kl, wanted), strict=True
    ):
        assert_near(one, other)


def test_more_stored_ids_come_closer_to_the_full_divergence_from_below():
    values = [distill_rows_topk(**inputs(k), vocab_size=SHARED).kl_rows for k in (1, 3, 9, 20, SHARED)]
    for fewer, more in itertools.pairwise(values):
        assert bool((more >= fewer - 1e-6).all())
    assert float(values[0].sum()) < 0.9 * float(values[-1].sum())


def test_a_stored_tail_replaces_the_one_that_rounding_left():
    given = inputs(5)
    exact = distill_rows_topk(**given, vocab_size=SHARED).kl_rows
    tail = 1 - given["teacher_logp"].exp().sum(-1)
    assert_near(distill_rows_topk(**given, teacher_tail=tail, vocab_size=SHARED).kl_rows, exact, 1e-5)
    assert not torch.allclose(distill_rows_topk(**given, teacher_tail=tail / 2, vocab_size=SHARED).kl_rows, exact)


def test_a_row_shows_nothing_of_what_it_has_no_weight_for():
    given = inputs(5)
    given["ce_weight"][2::4] = 0
    got = distill_rows_topk(**given, vocab_size=SHARED)
    assert torch.equal(got.ce_rows != 0, (given["ce_weight"] != 0) & (given["labels"] != IGNORE))
    assert torch.equal(got.kl_rows != 0, given["kl_weight"] != 0)


def test_rows_that_are_not_distilled_may_hold_anything():
    given = inputs(5)
    want = distill_rows_topk(**given, vocab_size=SHARED)
    dead = given["kl_weight"] == 0
    given["teacher_ids"], given["teacher_logp"] = given["teacher_ids"].clone(), given["teacher_logp"].clone()
    given["teacher_ids"][dead], given["teacher_logp"][dead] = -7, float("nan")
    got = distill_rows_topk(**given, vocab_size=SHARED)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
    assert torch.autograd.grad(got.ce + got.kl, given["student_hidden"])[0].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tail": "drop"}, "'drop'.*bucket"),
        ({"vocab_size": 20}, r"\[0, 20\)"),
        ({"vocab_size": V + 1}, f"{V + 1} must lie between 1 and .* {V}"),
        ({"teacher_logp": torch.zeros(N, 5)}, "sum to 5"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        distill_rows_topk(**{"vocab_size": SHARED, **inputs(5), **change})
