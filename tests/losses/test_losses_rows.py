"""distill_rows against the formulas in float64: values, gradients, and what must not matter."""

from __future__ import annotations

import pytest
import torch
from losses_oracle import IGNORE, assert_near, double, row_ce64, row_divergence64

from llavakd.losses import rows as rows_module
from llavakd.losses.rows import LogitForm, distill_rows

KINDS = [
    ("forward_kl", 0.5),
    ("reverse_kl", 0.5),
    ("jsd", 0.5),
    ("jsd", 0.1),
    ("jsd", 0.0),
    ("jsd", 1.0),
    ("skewed_kl", 0.1),
    ("skewed_kl", 0.0),
    ("total_variation", 0.5),
]
N, D_S, D_T, SHARED, V_S, V_T = 47, 31, 19, 123, 131, 127


def inputs(seed: int = 0, *, v_s: int = V_S, v_t: int = V_T, dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(SHARED, (N,), generator=generator)
    labels[::5] = IGNORE
    ce_weight, kl_weight = torch.rand(N, generator=generator), torch.rand(N, generator=generator)
    ce_weight[1::7] = 0
    kl_weight[3::4] = 0
    return {
        "student_hidden": draw(N, D_S).to(dtype).requires_grad_(True),
        "student_head": (draw(v_s, D_S) / 3).to(dtype).requires_grad_(True),
        "teacher_hidden": draw(N, D_T).to(dtype),
        "teacher_head": (draw(v_t, D_T) / 3).to(dtype),
        "labels": labels,
        "ce_weight": ce_weight,
        "kl_weight": kl_weight,
    }


def oracle(given: dict, width: int, kind: str = "forward_kl", beta: float = 0.5, temperature: float = 1.0):
    """(ce, kl, [hidden gradient, head gradient] of ce + 2 kl, ce per row, kl per row)."""
    hidden, head = double(given["student_hidden"]), double(given["student_head"])
    ce_rows, kl_rows = [], []
    for i in range(len(hidden)):
        dead = torch.zeros((), dtype=torch.float64)
        label = int(given["labels"][i])
        counts = given["ce_weight"][i] != 0 and label != IGNORE
        ce_rows.append(row_ce64(hidden[i], head, label, width) if counts else dead)
        if given["teacher_hidden"] is None or given["kl_weight"][i] == 0:
            kl_rows.append(dead)
            continue
        teacher = (given["teacher_hidden"][i].double(), given["teacher_head"].double())
        kl_rows.append(row_divergence64((hidden[i], head), teacher, width, kind, beta, temperature))
    ce_rows, kl_rows = torch.stack(ce_rows), torch.stack(kl_rows)
    ce, kl = ce_rows @ given["ce_weight"].double(), kl_rows @ given["kl_weight"].double()
    grads = torch.autograd.grad(ce + 2 * kl, [hidden, head])
    return ce, kl, grads, ce_rows, kl_rows


def compare(given: dict, width: int, kind="forward_kl", beta=0.5, temperature=1.0, tolerance=2e-5, **more) -> None:
    result = distill_rows(**given, divergence=kind, beta=beta, temperature=temperature, **more)
    ce, kl, grads, ce_rows, kl_rows = oracle(given, width, kind, beta, temperature)
    assert_near(result.ce, ce, tolerance, "ce")
    assert_near(result.kl, kl, tolerance, "kl")
    assert_near(result.ce_rows, ce_rows, tolerance, "ce_rows")
    assert_near(result.kl_rows, kl_rows, tolerance, "kl_rows")
    assert result.ce.dtype == result.kl.dtype == result.ce_rows.dtype == result.kl_rows.dtype == torch.float32
    assert not result.ce_rows.requires_grad
    assert not result.kl_rows.requires_grad
    got = torch.autograd.grad(result.ce + 2 * result.kl, [given["student_hidden"], given["student_head"]])
    for name, grad, want in zip(("student_hidden", "student_head"), got, grads, strict=True):
        assert_near(grad.float(), want, max(tolerance, torch.finfo(grad.dtype).eps), f"gradient of {name}")


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_every_divergence_equals_its_formula_in_value_and_gradient(kind, beta, temperature):
    compare(inputs(), SHARED, kind, beta, temperature, vocab_size=SHARED)


def test_equal_heads_need_no_vocab_size():
    compare(inputs(v_s=SHARED, v_t=SHARED), SHARED)


def test_columns_beyond_vocab_size_take_no_part():
    given = inputs()
    with torch.no_grad():
        given["student_head"][SHARED:] = 1e4
        given["teacher_head"][SHARED:] = -1e4
    compare(given, SHARED, vocab_size=SHARED)
    result = distill_rows(**given, vocab_size=SHARED)
    (grad,) = torch.autograd.grad(result.ce + result.kl, given["student_head"])
    assert grad[:SHARED].any(), "the head learns nothing"
    assert not grad[SHARED:].any()


def test_rows_without_weight_do_not_matter_even_when_not_finite():
    given = inputs()
    dead = (given["kl_weight"] == 0) & ((given["ce_weight"] == 0) | (given["labels"] == IGNORE))
    assert 0 < int(dead.sum()) < N, "the problem has no dead rows"
    clean = distill_rows(**given, vocab_size=SHARED)
    clean_grads = torch.autograd.grad(clean.ce + clean.kl, [given["student_hidden"], given["student_head"]])
    poison = torch.tensor([float("nan"), float("inf"), -float("inf")]).repeat(N)[:N]
    for name in ("student_hidden", "teacher_hidden"):
        given[name] = torch.where(dead[:, None], poison[:, None], given[name].detach())
    given["student_hidden"].requires_grad_(True)
    result = distill_rows(**given, vocab_size=SHARED)
    grads = torch.autograd.grad(result.ce + result.kl, [given["student_hidden"], given["student_head"]])
    for got, want in zip((*result, *grads), (*clean, *clean_grads), strict=True):
        assert torch.equal(got, want)


def test_a_teacher_row_that_is_not_finite_does_not_matter_where_only_cross_entropy_counts():
    given = inputs()
    untaught = given["kl_weight"] == 0
    want = oracle(given, SHARED)
    given["teacher_hidden"][untaught] = float("nan")
    result = distill_rows(**given, vocab_size=SHARED)
    assert_near(result.kl, want[1])
    grads = torch.autograd.grad(result.ce + 2 * result.kl, [given["student_hidden"], given["student_head"]])
    for got, grad in zip(grads, want[2], strict=True):
        assert_near(got, grad)


@pytest.mark.parametrize("with_teacher", [True, False])
@pytest.mark.parametrize("why", ["labels and weights", "no rows at all"])
def test_nothing_to_learn_is_zero_with_a_gradient_of_zeros(why, with_teacher):
    given = inputs()
    if why == "no rows at all":
        for name in ("student_hidden", "teacher_hidden", "labels", "ce_weight", "kl_weight"):
            given[name] = given[name][:0].detach()
        given["student_hidden"].requires_grad_(True)
    given["labels"] = torch.full_like(given["labels"], IGNORE)
    given["kl_weight"] = torch.zeros_like(given["kl_weight"])
    if not with_teacher:
        given["teacher_hidden"] = given["teacher_head"] = None
    result = distill_rows(**given, vocab_size=SHARED)
    assert float(result.ce.detach()) == float(result.kl.detach()) == 0
    for scalar in (result.ce, result.kl):  # each alone, as a weight of zero on the other would have it
        scalar.backward(retain_graph=True)
    for name in ("student_hidden", "student_head"):
        assert torch.equal(given[name].grad, torch.zeros_like(given[name])), name


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_gradient(kind, beta):
    given = inputs()
    given["teacher_hidden"], given["teacher_head"] = given["student_hidden"].detach(), given["student_head"].detach()
    result = distill_rows(**given, divergence=kind, beta=beta, temperature=2.0)
    assert abs(float(result.kl.detach())) < 1e-5
    for grad in torch.autograd.grad(result.kl, [given["student_hidden"], given["student_head"]]):
        assert float(grad.abs().max()) < 1e-5
    given["teacher_hidden"] = given["teacher_hidden"].flip(0)
    assert distill_rows(**given, divergence=kind, beta=beta, temperature=2.0).kl.detach() > 0.1


@pytest.mark.parametrize("chunk_rows", [1, 7, N - 1, N, 1000])
def test_the_chunk_size_does_not_matter(chunk_rows):
    compare(inputs(), SHARED, "jsd", 0.3, 1.7, vocab_size=SHARED, chunk_rows=chunk_rows)


def test_the_default_chunk_bounds_the_logits_held(monkeypatch):
    held, project = [], rows_module.product
    # Ten rows: 4 bytes of each model's logits and 4 of the gradients of four chunks.
    monkeypatch.setitem(rows_module.CHUNK_BYTES, "cpu", (4 + 4 + 4 * 4) * 10 * SHARED)
    monkeypatch.setattr(rows_module, "product", lambda a, b: held.append((len(a), b.shape[1])) or project(a, b))
    distill_rows(**inputs(), vocab_size=SHARED)
    logits = [rows for rows, width in held if width == SHARED]
    assert max(logits) == 10
    assert 80 < sum(logits) < 2 * N, "every row with a weight is computed once for both models, the others never"


def sweeps(monkeypatch) -> list:
    made, run = [], rows_module.Sweep.run
    monkeypatch.setattr(rows_module.Sweep, "run", lambda self, *a: made.append(1) or run(self, *a))
    return made


def test_a_plain_sum_costs_one_pass_and_unequal_weights_afterwards_a_second_one(monkeypatch):
    made, given = sweeps(monkeypatch), inputs()
    result = distill_rows(**given, vocab_size=SHARED)
    once = torch.autograd.grad(3 * (result.ce + result.kl), [given["student_hidden"], given["student_head"]])
    assert len(made) == 1
    result = distill_rows(**given, vocab_size=SHARED)
    again = torch.autograd.grad(3 * result.ce + 3.0 * result.kl, [given["student_hidden"], given["student_head"]])
    assert len(made) == 3
    for one, other in zip(once, again, strict=True):
        assert_near(one, other)


def test_backward_twice_over_one_graph_gives_the_same_gradient():
    given = inputs()
    result = distill_rows(**given, vocab_size=SHARED)
    total, wanted = result.ce + result.kl, [given["student_hidden"], given["student_head"]]
    first = [grad.clone() for grad in torch.autograd.grad(total, wanted, retain_graph=True)]
    for one, other in zip(first, torch.autograd.grad(total, wanted), strict=True):
        assert_near(one, other)


def test_second_derivatives_are_refused():
    given = inputs()
    result = distill_rows(**given, vocab_size=SHARED)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(result.ce + result.kl, given["student_hidden"], create_graph=True)


@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.3), ("skewed_kl", 0.1)])
def test_gradcheck_in_float64(kind, beta):
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    fixed = {"ce_weight": torch.tensor([1.0, 0.5, 0.0, 2.0]), "kl_weight": torch.tensor([0.3, 0.0, 1.0, 0.7])}
    fixed |= {"teacher_hidden": draw(4, 2), "teacher_head": draw(5, 2), "labels": torch.tensor([4, 0, 2, IGNORE])}

    def losses(hidden, head):
        return distill_rows(hidden, head, **fixed, divergence=kind, beta=beta, temperature=1.3, chunk_rows=3)[:2]

    leaves = draw(4, 3).requires_grad_(True), draw(5, 3).requires_grad_(True)
    assert torch.autograd.gradcheck(losses, leaves)


@pytest.mark.parametrize("forms", [((1.0, 30.0), (1.0, 0.0)), ((0.25, 0.0), (3.0, 5.0)), ((2.0, 1.5), (0.5, 2.0))])
def test_soft_caps_and_scales_of_the_logits(forms):
    given = inputs()

    def bend(scale, cap):
        return lambda logits: cap * torch.tanh(scale * logits / cap) if cap else scale * logits

    curves = [bend(*form) for form in forms]
    got = distill_rows(
        **given,
        vocab_size=SHARED,
        temperature=1.4,
        student_form=LogitForm(*forms[0]),
        teacher_form=LogitForm(*forms[1]),
    )
    hidden, head = double(given["student_hidden"]), double(given["student_head"])
    want = torch.zeros((), dtype=torch.float64)
    for i in range(N):
        if given["labels"][i] != IGNORE:
            want = want + given["ce_weight"][i] * row_ce64(hidden[i], head, int(given["labels"][i]), SHARED, curves[0])
        teacher = (given["teacher_hidden"][i].double(), given["teacher_head"].double())
        distance = row_divergence64((hidden[i], head), teacher, SHARED, temperature=1.4, forms=tuple(curves))
        want = want + given["kl_weight"][i] * distance
    assert_near(got.ce + got.kl, want)
    grads = torch.autograd.grad(got.ce + got.kl, [given["student_hidden"], given["student_head"]])
    for grad, wanted in zip(grads, torch.autograd.grad(want, [hidden, head]), strict=True):
        assert_near(grad, wanted)


def test_without_a_teacher_there_is_cross_entropy_alone():
    given = inputs()
    given["teacher_hidden"] = given["teacher_head"] = None
    plain = given | {"kl_weight": torch.zeros(N)}
    compare(plain, SHARED, vocab_size=SHARED, tolerance=2e-5)
    assert distill_rows(**plain, vocab_size=SHARED).kl.detach() == 0
    with pytest.raises(ValueError, match="teacher_hidden is None"):
        distill_rows(**given, vocab_size=SHARED)


def test_no_gradient_reaches_the_teacher():
    given = inputs()
    given["teacher_hidden"].requires_grad_(True)
    given["teacher_head"].requires_grad_(True)
    for chunk_rows in (None, 9):
        result = distill_rows(**given, vocab_size=SHARED, chunk_rows=chunk_rows)
        (result.ce + result.kl).backward()
    assert given["student_hidden"].grad.any()
    assert given["teacher_hidden"].grad is None
    assert given["teacher_head"].grad is None


def test_a_frozen_head_still_passes_the_gradient_on():
    given = inputs()
    want = oracle(given, SHARED)[2][0]
    given["student_head"] = given["student_head"].detach()
    result = distill_rows(**given, vocab_size=SHARED, chunk_rows=9)
    (result.ce + 2 * result.kl).backward()
    assert_near(given["student_hidden"].grad, want)
    assert given["student_head"].grad is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_half_precision_inputs_get_a_float32_softmax(kind, autocast):
    """The truth is float64 on the same rounded inputs; logits in bfloat16 miss it a hundredfold."""
    given = inputs(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        compare(given, SHARED, kind, vocab_size=SHARED)


def test_half_precision_logits_would_be_noticed():
    given = inputs(dtype=torch.bfloat16)
    logits = given["student_hidden"] @ given["student_head"][:SHARED].T
    rough = torch.nn.functional.cross_entropy(logits.float(), given["labels"], reduction="none")
    with pytest.raises(AssertionError, match="off by"):
        assert_near((rough * given["ce_weight"]).sum(), oracle(given, SHARED)[0])


@pytest.mark.parametrize("label", [SHARED, V_S, -1])
def test_a_label_outside_the_shared_vocabulary_is_refused(label):
    given = inputs()
    given["labels"][2] = label
    assert given["ce_weight"][2] != 0
    with pytest.raises(ValueError, match=f"{label}.*{SHARED}"):
        distill_rows(**given, vocab_size=SHARED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "131 and 127.*vocab_size"),
        ({"vocab_size": 128}, "128.*127"),
        ({"vocab_size": 0}, "between 1"),
        ({"vocab_size": SHARED, "divergence": "kl"}, "'kl'.*forward_kl, reverse_kl, jsd, skewed_kl"),
        ({"vocab_size": SHARED, "backend": "cuda"}, "'cuda'"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        distill_rows(**inputs(), **change)


def of_another_gradient(q, p, beta):
    """The forward KL in value, the reverse KL in gradient."""
    reverse = q.exp() * (q - p)
    return p.exp() * (p - q.detach()) + reverse - reverse.detach()


FAULTS = {
    "teacher and student swapped": lambda q, p, beta: q.exp() * (q - p),
    "cross-entropy instead of divergence": lambda q, p, beta: -p.exp() * q,
    "mean over the vocabulary": lambda q, p, beta: p.exp() * (p - q) / q.shape[1],
    "the gradient of the reverse KL": of_another_gradient,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_detects_a_wrong_divergence(fault, monkeypatch):
    monkeypatch.setitem(rows_module.DIVERGENCES, "forward_kl", FAULTS[fault])
    with pytest.raises(AssertionError, match="off by"):
        compare(inputs(), SHARED, vocab_size=SHARED)


@pytest.mark.parametrize("dropped", ["ce_weight", "kl_weight"])
def test_the_comparison_detects_a_dropped_weight(dropped):
    given = inputs()
    result = distill_rows(**given | {dropped: (given[dropped] != 0).float()}, vocab_size=SHARED)
    ce, kl, *_ = oracle(given, SHARED)
    with pytest.raises(AssertionError, match="off by"):
        assert_near(result.ce + result.kl, ce + kl)


def test_a_chunk_of_no_rows_is_refused_and_not_taken_for_the_default():
    with pytest.raises(ValueError, match="must not be zero"):
        distill_rows(**inputs(), vocab_size=SHARED, chunk_rows=0)
