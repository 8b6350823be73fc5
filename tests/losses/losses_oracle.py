"""Float64 oracles of the losses, written row by row from the formulas of LLaVA-KD, and one odd-shaped problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORE = -100


def softmax64(logits: Tensor) -> Tensor:
    weights = (logits - logits.max()).exp()
    return weights / weights.sum()


def kl64(p: Tensor, q: Tensor) -> Tensor:
    return sum(p * torch.log(p / q))


def divergence64(kind: str, p: Tensor, q: Tensor, beta: float) -> Tensor:
    """P teacher, Q student, M = beta P + (1 - beta) Q: KL(P|Q), KL(Q|P), beta KL(P|M) + (1 - beta) KL(Q|M), KL(P|M) or
    half the sum of |P - Q|."""
    if kind == "total_variation":
        return (p - q).abs().sum() / 2
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl64(q, p)
    if kind == "forward_kl" or beta == 0:
        return kl64(p, q)
    middle = beta * p + (1 - beta) * q
    if kind == "skewed_kl":
        return kl64(p, middle)
    return beta * kl64(p, middle) + (1 - beta) * kl64(q, middle)


def row_ce64(hidden: Tensor, head: Tensor, label: int, width: int, form=lambda logits: logits) -> Tensor:
    return -torch.log(softmax64(form(head[:width] @ hidden))[label])


def row_divergence64(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    width: int,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    forms: tuple = (lambda logits: logits, lambda logits: logits),
) -> Tensor:
    """`student` and `teacher` are (hidden of one position, head)."""
    q, p = (
        softmax64(form(head[:width] @ hidden) / temperature)
        for (hidden, head), form in zip((student, teacher), forms, strict=True)
    )
    return divergence64(kind, p, q, beta)


def relation64(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    width: int,
    *,
    center: bool = False,
    row_normalize: bool = False,
) -> Tensor:
    """1 - cos(vec(Z_s Z_s^T), vec(Z_t Z_t^T)) of one picture, from materialised logits Z = H W^T."""
    grams = []
    for hidden, head in (student, teacher):
        logits = hidden @ head[:width].T
        if center:
            logits = logits - logits.mean(0)
        if row_normalize:
            logits = logits / logits.norm(dim=1, keepdim=True)
        grams.append((logits @ logits.T).flatten())
    return 1 - (grams[0] @ grams[1]) / (grams[0].norm() * grams[1].norm())


def double(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().double().requires_grad_(True)


def assert_near(got: Tensor, want: Tensor, tolerance: float = 2e-5, what: str = "value") -> None:
    """Element-wise, against the largest wanted magnitude; where nothing but zeros is wanted, nothing else will do."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    error = (got.detach().double() - want.detach().double()).abs().max() if want.numel() else torch.zeros(())
    bound = tolerance * want.detach().abs().max() if want.numel() else 0
    assert error <= bound, f"{what}: off by {float(error):.3e}, allowed {float(bound):.3e}"


@dataclass
class Problem:
    """Inputs of `objective`: B rows of T positions, pictures of `tokens` positions each."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor
    labels: Tensor
    visual: Tensor
    image_rows: Tensor
    vocab_size: int
    tokens: int

    def rows(self, index: list[int]) -> Problem:
        """The same problem with these rows only, as a micro-batch would hold them."""
        image_rows = [new for new, old in enumerate(index) for _ in range(int((self.image_rows == old).sum()))]
        return Problem(
            self.student_hidden.detach()[index].clone().requires_grad_(True),
            self.student_head.detach().clone().requires_grad_(True),
            self.teacher_hidden[index].clone(),
            self.teacher_head.clone(),
            self.labels[index],
            self.visual[index],
            torch.tensor(image_rows, dtype=torch.int64),
            self.vocab_size,
            self.tokens,
        )


TOKENS = 5
# Start of every picture, then (start, stop) of every supervised stretch, then the row's length.
LAYOUT = (
    ([7, 14], [(24, 31), (38, 45)], 46),  # two pictures, two answers
    ([], [(9, 12)], 12),  # text only
    ([0], [(5, 9)], 9),  # `pretrain`: the last picture position predicts the first caption token
)


def make_problem(seed: int = 0, layout: tuple = LAYOUT, width: int = 47) -> Problem:
    """(B, T, D, V) = (3, 47, 31, 123) with unequal widths and heads on the two sides."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, shared = len(layout), 123
    labels = torch.full((batch, width), IGNORE)
    visual = torch.zeros(batch, width, dtype=torch.bool)
    image_rows = []
    for row, (pictures, answers, _) in enumerate(layout):
        for start in pictures:
            visual[row, start : start + TOKENS] = True
            image_rows.append(row)
        for start, stop in answers:
            labels[row, start:stop] = torch.randint(shared, (stop - start,), generator=generator)
    return Problem(
        student_hidden=draw(batch, width, 31).requires_grad_(True),
        student_head=(draw(131, 31) / 3).requires_grad_(True),
        teacher_hidden=draw(batch, width, 19),
        teacher_head=draw(127, 19) / 3,
        labels=labels,
        visual=visual,
        image_rows=torch.tensor(image_rows, dtype=torch.int64),
        vocab_size=shared,
        tokens=TOKENS,
    )


@dataclass
class Wanted:
    total: Tensor
    parts: dict[str, Tensor]
    hidden_grad: Tensor
    head_grad: Tensor


def objective64(problem: Problem, losses, reduction: str, shift: int = 1) -> Wanted:
    """LLaVA-KD's loss, position by position: the response row of labels[b, t] is t - shift; picture rows do not move."""
    hidden, head = double(problem.student_hidden), double(problem.student_head)
    taught, teacher_head = problem.teacher_hidden.double(), problem.teacher_head.double()
    width = problem.vocab_size
    values: list[dict[str, list[Tensor]]] = []
    for row, labels in enumerate(problem.labels.tolist()):
        found: dict[str, list[Tensor]] = {"ce": [], "response_kl": [], "visual_kl": [], "relation": []}

        def divergence(position: int, row: int = row) -> Tensor:
            return row_divergence64(
                (hidden[row, position], head),
                (taught[row, position], teacher_head),
                width,
                losses.divergence,
                losses.beta,
                losses.temperature,
            )

        for target, label in enumerate(labels):
            if label != IGNORE and target >= shift:
                found["ce"].append(row_ce64(hidden[row, target - shift], head, label, width))
                found["response_kl"].append(divergence(target - shift))
        seen = [position for position, is_visual in enumerate(problem.visual[row].tolist()) if is_visual]
        found["visual_kl"] = [divergence(position) for position in seen]
        for start in range(0, len(seen), problem.tokens):
            places = seen[start : start + problem.tokens]
            found["relation"].append(
                relation64(
                    (hidden[row, places], head),
                    (taught[row, places], teacher_head),
                    width,
                    center=losses.relation_center,
                    row_normalize=losses.relation_row_normalize,
                )
            )
        values.append(found)
    parts = {}
    for part in ("ce", "response_kl", "visual_kl", "relation"):
        rows = [found[part] for found in values]
        if reduction == "token":
            parts[part] = sum(sum(row) for row in rows) / max(sum(len(row) for row in rows), 1)
        else:
            parts[part] = sum(sum(row) / len(row) for row in rows if row) / len(rows)
        parts[part] = torch.as_tensor(parts[part], dtype=torch.float64)
    total = sum(getattr(losses, part) * value for part, value in parts.items())
    total.backward()
    return Wanted(total.detach(), {k: v.detach() for k, v in parts.items()}, hidden.grad, head.grad)
