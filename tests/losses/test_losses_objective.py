"""The objective against LLaVA-KD's formulas in float64: shift, segments, reductions, counts and weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from losses_oracle import IGNORE, LAYOUT, Problem, assert_near, make_problem, objective64, softmax64

from llavakd.config import LossConfig
from llavakd.losses import objective as objective_function
from llavakd.losses.objective import Counts, Objective, count
from llavakd.losses.offline import Taught

PAPER = LossConfig(ce=1.0, response_kl=1.0, visual_kl=1.0, relation=0.5)
UNEVEN = LossConfig(
    ce=0.7,
    response_kl=1.3,
    visual_kl=0.4,
    relation=5.0,
    divergence="jsd",
    beta=0.3,
    temperature=2.0,
    relation_center=True,
    relation_row_normalize=True,
)
PARTS = ("ce", "response_kl", "visual_kl", "relation")
ONLY = {part: LossConfig(**{part: 1.5}) for part in PARTS}
REDUCTIONS = ["sample", "token"]


def counts_of(problem: Problem) -> Counts:
    return count(problem.labels, problem.visual, problem.image_rows)


def run(problem: Problem, losses: LossConfig, reduction: str, counts: Counts | None = None, **change) -> Objective:
    arguments = {
        "labels": problem.labels,
        "visual": problem.visual,
        "image_rows": problem.image_rows,
        "vocab_size": problem.vocab_size,
        "losses": losses,
        "reduction": reduction,
        "counts": counts or counts_of(problem),
        "teacher_hidden": problem.teacher_hidden,
        "teacher_head": problem.teacher_head,
    }
    return objective_function(problem.student_hidden, problem.student_head, **arguments | change)


def gradients(result: Objective, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.autograd.grad(result.total, [problem.student_hidden, problem.student_head])


def compare(result: Objective, problem: Problem, losses: LossConfig, reduction: str) -> None:
    want = objective64(problem, losses, reduction)
    assert_near(result.total, want.total, what="total")
    for part, weight in losses.weights.items():
        if weight:
            assert_near(result.parts[part], want.parts[part], what=part)
    hidden_grad, head_grad = gradients(result, problem)
    assert_near(hidden_grad, want.hidden_grad, what="gradient of student_hidden")
    assert_near(head_grad, want.head_grad, what="gradient of student_head")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("losses", [PAPER, UNEVEN, *ONLY.values()], ids=["paper", "uneven", *ONLY])
def test_it_equals_the_formula_in_total_parts_and_gradients(losses, reduction):
    problem = make_problem()
    compare(run(problem, losses, reduction), problem, losses, reduction)


def test_the_two_reductions_differ_on_uneven_rows():
    problem = make_problem()
    with torch.no_grad():  # the shortest row far worse than the others
        problem.student_hidden[2] *= 3
    sample, token = (run(problem, PAPER, reduction) for reduction in REDUCTIONS)
    for part in PARTS:
        assert abs(float(sample.parts[part] / token.parts[part]) - 1) > 0.01, part


def test_parts_are_detached_and_not_yet_weighted():
    problem = make_problem()
    one, two = (run(problem, LossConfig(**dict.fromkeys(PARTS, weight)), "sample") for weight in (1.0, 2.0))
    for part in PARTS:
        assert not one.parts[part].requires_grad
        assert one.parts[part].dtype == torch.float32
        assert_near(two.parts[part], one.parts[part])
    assert_near(sum(one.parts.values()), one.total)
    assert_near(two.total, 2 * one.total)


def test_the_first_response_token_is_predicted_by_the_position_before_it():
    problem = make_problem(layout=(([3], [(12, 13)], 13),))
    (grad, _) = gradients(run(problem, LossConfig(ce=1.0, response_kl=1.0), "token"), problem)
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == [11]


def test_a_position_can_be_both_picture_and_prediction():
    """`pretrain` puts the caption right behind the picture: position 4 is visual and predicts token 5."""
    problem = make_problem(layout=(([0], [(5, 6)], 6),))
    losses = {"response": LossConfig(response_kl=1.0), "visual": LossConfig(visual_kl=1.0)}
    grads = {name: gradients(run(problem, loss, "token"), problem)[0][0] for name, loss in losses.items()}
    assert grads["response"].abs().sum(-1).nonzero().flatten().tolist() == [4]
    assert grads["visual"].abs().sum(-1).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    both = LossConfig(response_kl=1.0, visual_kl=1.0)
    compare(run(problem, both, "token"), problem, both, "token")
    assert_near(gradients(run(problem, both, "token"), problem)[0][0], grads["response"] + grads["visual"])


def test_a_label_on_the_first_position_has_no_predictor_and_is_not_counted():
    problem = make_problem()
    before = run(problem, PAPER, "token")
    problem.labels[:, 0] = 7
    after = run(problem, PAPER, "token")
    assert torch.equal(after.total, before.total)


def test_counts_are_those_of_the_layout():
    answers = sum(stop - start for _, stretches, _ in LAYOUT for start, stop in stretches)
    assert counts_of(make_problem()) == Counts(samples=3, response_tokens=answers, visual_tokens=15, images=3)


@pytest.mark.parametrize("losses", [PAPER, UNEVEN], ids=["paper", "uneven"])
def test_the_sample_reduction_is_the_mean_over_rows_taken_alone(losses):
    problem = make_problem()
    whole = run(problem, losses, "sample")
    hidden_grad, head_grad = gradients(whole, problem)
    total, parts, head_sum = torch.zeros(()), dict.fromkeys(PARTS, 0.0), torch.zeros_like(head_grad)
    for row in range(3):
        alone = problem.rows([row])
        result = run(alone, losses, "sample")
        grads = gradients(result, alone)
        assert_near(hidden_grad[row], grads[0][0] / 3, what=f"gradient of row {row}")
        total, head_sum = total + result.total / 3, head_sum + grads[1] / 3
        parts = {part: parts[part] + result.parts[part] / 3 for part in PARTS}
    assert_near(whole.total, total)
    assert_near(head_grad, head_sum)
    for part in PARTS:
        assert_near(whole.parts[part], parts[part], what=part)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("cut", [[[0], [1, 2]], [[2, 1], [0]], [[0], [1], [2]]], ids=str)
def test_micro_batches_with_global_counts_add_up_to_one_batch(cut, reduction):
    """Whatever the cut, a text-only micro-batch included: values, parts and gradients."""
    problem = make_problem()
    counts = counts_of(problem)
    assert Counts(*(sum(c) for c in zip(*(counts_of(problem.rows(rows)) for rows in cut), strict=True))) == counts
    whole = run(problem, UNEVEN, reduction)
    hidden_grad, head_grad = gradients(whole, problem)
    total, parts, head_sum = torch.zeros(()), dict.fromkeys(PARTS, 0.0), torch.zeros_like(head_grad)
    for rows in cut:
        micro = problem.rows(rows)
        result = run(micro, UNEVEN, reduction, counts)
        grads = gradients(result, micro)
        assert_near(grads[0], hidden_grad[rows], what=f"gradient of rows {rows}")
        total, head_sum = total + result.total, head_sum + grads[1]
        parts = {part: parts[part] + result.parts[part] for part in PARTS}
    assert_near(total, whole.total)
    assert_near(head_sum, head_grad)
    for part in PARTS:
        assert_near(parts[part], whole.parts[part], what=part)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_padding_on_the_right_changes_nothing_whatever_it_holds(reduction):
    problem = make_problem()
    before = run(problem, PAPER, reduction)
    want = gradients(before, problem)
    pad = 9

    def widen(tensor: torch.Tensor, fill: float) -> torch.Tensor:
        return torch.cat([tensor.detach(), tensor.new_full((3, pad, *tensor.shape[2:]), fill)], dim=1)

    wide = dataclasses.replace(
        problem,
        student_hidden=widen(problem.student_hidden, float("nan")).requires_grad_(True),
        teacher_hidden=widen(problem.teacher_hidden, float("nan")),
        labels=widen(problem.labels, IGNORE),
        visual=widen(problem.visual, False),
    )
    for row, (_, _, length) in enumerate(LAYOUT):  # what was padding already may hold anything too
        with torch.no_grad():
            wide.student_hidden[row, length:] = float("inf")
            wide.teacher_hidden[row, length:] = float("nan")
    after = run(wide, PAPER, reduction)
    grads = gradients(after, wide)
    assert torch.equal(after.total, before.total)
    assert torch.equal(grads[0][:, :-pad], want[0])
    assert not grads[0][:, -pad:].any()
    assert torch.equal(grads[1], want[1])


def packed(problem: Problem) -> tuple[Problem, torch.Tensor]:
    """The rows of a problem one behind the other without their padding, and the positions of each from 0."""
    places = [(row, place) for row, (_, _, length) in enumerate(LAYOUT) for place in range(length)]
    rows, positions = torch.tensor(places).T
    lines = {
        name: getattr(problem, name).detach()[rows, positions][None].clone()
        for name in ("student_hidden", "teacher_hidden", "labels", "visual")
    }
    pack = dataclasses.replace(problem, **lines)
    pack.student_hidden.requires_grad_(True)
    return pack, positions[None]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("losses", [PAPER, UNEVEN, *ONLY.values()], ids=["paper", "uneven", *ONLY])
def test_packed_rows_are_counted_and_judged_as_padded_ones(losses, reduction):
    problem = make_problem()
    problem.labels[:, 0] = 7  # nothing before a row's first position may predict it, least of all another row
    pack, positions = packed(problem)
    counts = count(pack.labels, pack.visual, pack.image_rows, positions)
    assert counts == counts_of(problem)
    assert counts.samples == 3
    wanted = run(problem, losses, reduction)
    got = run(pack, losses, reduction, counts, position_ids=positions)
    assert_near(got.total, wanted.total)
    for part, value in wanted.parts.items():
        assert_near(got.parts[part], value, what=part)
    (hidden, head), (packed_hidden, packed_head) = gradients(wanted, problem), gradients(got, pack)
    assert_near(packed_head, head)
    assert_near(packed_hidden[0], torch.cat([hidden[row, :length] for row, (_, _, length) in enumerate(LAYOUT)]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_segments_with_a_loss_get_a_gradient(reduction):
    problem = make_problem()
    (grad, _) = gradients(run(problem, PAPER, reduction), problem)
    touched = problem.visual.clone()
    touched[:, :-1] |= problem.labels[:, 1:] != IGNORE
    assert torch.equal(grad.abs().sum(-1) > 0, touched)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_without_pictures_have_no_picture_parts(reduction):
    problem = make_problem(layout=(LAYOUT[1], LAYOUT[1]))
    result = run(problem, PAPER, reduction)
    assert float(result.parts["visual_kl"]) == float(result.parts["relation"]) == 0
    assert float(result.parts["ce"]) > 0
    compare(result, problem, PAPER, reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_with_nothing_to_learn_is_zero_with_a_gradient_of_zeros(reduction):
    problem = make_problem(layout=(([], [], 3),))
    result = run(problem, PAPER, reduction)
    assert float(result.total.detach()) == 0
    assert set(map(float, result.parts.values())) == {0.0}
    assert not any(grad.any() for grad in gradients(result, problem))


def test_a_row_without_a_response_counts_as_a_sample_and_adds_nothing():
    problem = make_problem(layout=(LAYOUT[1], ([], [], 12)))
    alone = run(problem.rows([0]), ONLY["ce"], "sample")
    assert_near(run(problem, ONLY["ce"], "sample").total, alone.total / 2)
    assert_near(run(problem, ONLY["ce"], "token").total, run(problem.rows([0]), ONLY["ce"], "token").total)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_a_teacher_there_is_cross_entropy_alone(reduction):
    problem = make_problem()
    result = run(problem, ONLY["ce"], reduction, teacher_hidden=None, teacher_head=None)
    assert list(result.parts) == ["ce"]
    compare(result, problem, ONLY["ce"], reduction)


def test_a_relation_without_a_teacher_is_not_passed_over():
    with pytest.raises(AssertionError, match="needs a teacher"):
        run(make_problem(), ONLY["relation"], "sample", teacher_hidden=None, teacher_head=None)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_student_equal_to_its_teacher_has_cross_entropy_alone(reduction):
    problem = make_problem()
    problem.teacher_hidden, problem.teacher_head = problem.student_hidden.detach(), problem.student_head.detach()
    result = run(problem, PAPER, reduction)
    for part in ("response_kl", "visual_kl", "relation"):
        assert abs(float(result.parts[part])) < 1e-6, part
    assert_near(result.total, run(problem, ONLY["ce"], reduction).total / 1.5)


def test_no_gradient_reaches_the_teacher():
    problem = make_problem()
    problem.teacher_hidden.requires_grad_(True)
    problem.teacher_head.requires_grad_(True)
    run(problem, PAPER, "sample").total.backward()
    assert problem.student_hidden.grad.any()
    assert problem.teacher_hidden.grad is None
    assert problem.teacher_head.grad is None


def test_half_precision_hidden_states_are_judged_in_float32():
    problem = make_problem()
    for name in ("student_hidden", "student_head", "teacher_hidden", "teacher_head"):
        setattr(problem, name, getattr(problem, name).detach().bfloat16())
    problem.student_hidden.requires_grad_(True)
    problem.student_head.requires_grad_(True)
    result = run(problem, PAPER, "sample")
    want = objective64(problem, PAPER, "sample")
    assert result.total.dtype == torch.float32
    assert_near(result.total, want.total)
    for got, grad in zip(gradients(result, problem), (want.hidden_grad, want.head_grad), strict=True):
        assert_near(got.float(), grad, 2 * torch.finfo(torch.bfloat16).eps)


FAULTS = {
    "labels shifted twice": lambda p, c: {"labels": p.labels.roll(1, 1)},
    "labels not shifted": lambda p, c: {"labels": p.labels.roll(-1, 1)},
    "labels not masked": lambda p, c: {"labels": p.labels.clamp_min(0)},
    "pictures shifted": lambda p, c: {"visual": p.visual.roll(1, 1)},
    "one picture position dropped": lambda p, c: {
        "visual": p.visual.roll(-1, 1) & p.visual,
        "image_rows": p.image_rows,
    },
    "vocabulary not cut": lambda p, c: {"vocab_size": 127},
    "teacher positions shifted": lambda p, c: {"teacher_hidden": p.teacher_hidden.roll(1, 1)},
    "temperature dropped": lambda p, c: {"losses": dataclasses.replace(UNEVEN, temperature=1.0)},
    "mixture dropped": lambda p, c: {"losses": dataclasses.replace(UNEVEN, beta=0.5)},
    "centring dropped": lambda p, c: {"losses": dataclasses.replace(UNEVEN, relation_center=False)},
    "one weight dropped": lambda p, c: {"losses": dataclasses.replace(UNEVEN, visual_kl=1.0)},
    "reduction swapped": lambda p, c: {"reduction": "token"},
    "text-only rows not counted": lambda p, c: {"counts": c._replace(samples=2)},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects(fault):
    """A comparison that passes with a fault planted would prove nothing."""
    problem = make_problem()
    arguments = {"losses": UNEVEN, "reduction": "sample"} | FAULTS[fault](problem, counts_of(problem))
    result = run(problem, **arguments)
    with pytest.raises(AssertionError, match="off by"):
        compare(result, problem, UNEVEN, "sample")


@pytest.mark.parametrize("field", ["response_tokens", "visual_tokens", "images"])
def test_the_comparison_detects_a_wrong_global_count(field):
    problem = make_problem()
    counts = counts_of(problem)
    result = run(problem, UNEVEN, "token", counts._replace(**{field: getattr(counts, field) + 1}))
    with pytest.raises(AssertionError, match="off by"):
        compare(result, problem, UNEVEN, "token")


def test_the_oracle_without_a_shift_gives_another_answer():
    problem = make_problem()
    result = run(problem, PAPER, "sample")
    unshifted = objective64(problem, PAPER, "sample", shift=0)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(result.total, unshifted.total)


def stored(problem: Problem, k: int, wanted: torch.Tensor) -> Taught:
    """What a cache has of the positions `wanted`, bool [B, T], and of those that predict a label."""
    places = wanted.clone()
    places[:, :-1] |= problem.labels[:, 1:] != IGNORE
    places = places.flatten().nonzero().squeeze(1)
    width = problem.vocab_size
    logits = problem.teacher_hidden.flatten(0, 1)[places].double() @ problem.teacher_head[:width].double().T
    logp = logits.log_softmax(-1)
    values, ids = logp.topk(k)
    return Taught(places, ids, values.float(), logp.scatter(1, ids, -torch.inf).exp().sum(-1).float())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_stored_teacher_of_all_ids_gives_the_losses_and_gradients_of_one_that_is_there(reduction):
    losses, problem = LossConfig(ce=0.7, response_kl=1.3, visual_kl=0.4), make_problem()
    taught = stored(problem, problem.vocab_size, problem.visual)
    absent = {"teacher_hidden": None, "teacher_head": None, "taught": taught}
    compare(run(problem, losses, reduction, **absent), problem, losses, reduction)
    for got, want in zip(
        gradients(run(problem, losses, reduction, **absent), problem),
        gradients(run(problem, losses, reduction), problem),
        strict=True,
    ):
        assert_near(got, want, what="gradient")


def test_a_few_stored_ids_at_some_visual_positions_give_the_mean_over_those_of_the_kl_of_the_outcomes():
    losses, problem, k = LossConfig(response_kl=1.3, visual_kl=0.4), make_problem(), 3
    some = problem.visual & (torch.rand(problem.visual.shape, generator=torch.Generator().manual_seed(0)) < 0.5)
    assert 0 < some.sum() < problem.visual.sum()
    taught, labels = stored(problem, k, some), problem.labels
    counts = count(labels, some, problem.image_rows)
    given = {"visual": some, "teacher_hidden": None, "teacher_head": None, "taught": taught, "counts": counts}
    hidden, head = problem.student_hidden.detach().double().requires_grad_(True), problem.student_head.detach().double()
    predicts = torch.zeros_like(some)
    predicts[:, :-1] = labels[:, 1:] != IGNORE
    parts = {}
    for name, chosen in (("response_kl", predicts), ("visual_kl", some)):
        terms = []
        for row, place in chosen.nonzero().tolist():
            at = int((taught.places == row * labels.shape[1] + place).nonzero())
            q, p = softmax64(head[: problem.vocab_size] @ hidden[row, place]), taught.logp[at].double().exp()
            rest = 1 - p.sum()
            outside = 1 - q[taught.ids[at]].sum()
            terms.append((p * (p / q[taught.ids[at]]).log()).sum() + rest * (rest / outside).log())
        parts[name] = torch.stack(terms).mean()
    result = run(problem, losses, "token", **given)
    for name, value in parts.items():
        assert_near(result.parts[name], value, what=name)
    (got,) = torch.autograd.grad(result.total, problem.student_hidden)
    (want,) = torch.autograd.grad(1.3 * parts["response_kl"] + 0.4 * parts["visual_kl"], hidden)
    assert_near(got, want, what="gradient")


def test_a_place_that_is_distilled_but_not_stored_is_an_error():
    losses, problem = LossConfig(response_kl=1.0, visual_kl=1.0), make_problem()
    taught = stored(problem, 4, torch.zeros_like(problem.visual))
    with pytest.raises(AssertionError, match="was not stored"):
        run(problem, losses, "token", teacher_hidden=None, teacher_head=None, taught=taught)
