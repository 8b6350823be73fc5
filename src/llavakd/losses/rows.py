"""Cross-entropy and divergence of chosen rows, their gradients made on the way, by chunks: no [rows, vocabulary] is held."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakd.losses.divergence import DIVERGENCES, resolve
from llavakd.losses.products import accumulate, exact_dtype, gradient_dtype, operand_dtype, product
from llavakd.transfer import sent

IGNORE_INDEX = -100
CHUNK_BYTES = {"cpu": 2**26, "cuda": 19 * 2**26}  # logits of one chunk, both models, and the gradients kept of some
GRADIENT_CHUNKS = 4  # whose gradients go into one product: each adds to the whole head's gradient
_TILE = 256  # rows of a product's tile on a Hopper GPU
# Of a chunk: (student logits, where their gradient goes, ce_weight, kl_weight, labels, *given) -> (CE, divergence), each
# zero in a row without its weight, which may hold anything.
Score = Callable[..., tuple[Tensor, Tensor]]


class RowLosses(NamedTuple):
    """`ce` and `kl` are differentiable float32 scalars; the per-row values are detached float32 [N], for reports."""

    ce: Tensor
    kl: Tensor
    ce_rows: Tensor
    kl_rows: Tensor


class LogitForm(NamedTuple):
    """How a family forms its logits: cap * tanh(scale * H W^T / cap), without the tanh where `cap` is 0."""

    scale: float = 1.0
    cap: float = 0.0


Scoring = tuple[str, float, float, tuple[LogitForm, LogitForm]]  # divergence, beta, temperature, of student and teacher


def distill_rows(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor | None,
    teacher_head: Tensor | None,
    labels: Tensor,
    *,
    ce_weight: Tensor,
    kl_weight: Tensor,
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "skewed_kl", "total_variation"] = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    chunk_rows: int | None = None,
    backend: Literal["auto", "torch", "triton"] = "auto",
    student_form: LogitForm = LogitForm(),
    teacher_form: LogitForm = LogitForm(),
) -> RowLosses:
    """Weighted sums of next-token cross-entropy and teacher-student divergence over N rows.

    ce = sum_i ce_weight_i CE_i at temperature 1; kl = sum_i kl_weight_i D_i with both sides softened by `temperature`
    (no T^2 factor: put it into the weights). Rows without weight are never projected. On a GPU half-precision inputs
    (or autocast) multiply in that precision into float32 logits; softmax and divergence are float32 (float64 for
    float64 inputs) and the gradient is rounded once, before its two products. Gradients reach student_hidden and, when
    it requires one, student_head; never the teacher, never the weights. Backward once only: no second derivatives.
    Labels and weights may lie on the CPU, all three of them; then nothing waits for the device.

    student_hidden: [N, D_s]; row i is the position that predicts labels[i].
    student_head: [V_s, D_s], without bias.
    teacher_hidden, teacher_head: [N, D_t] and [V_t, D_t], or None when nothing is distilled.
    labels: int64 [N]; -100: no cross-entropy in that row.
    ce_weight, kl_weight: float32 [N].
    divergence: key of DIVERGENCES (LLaVA-KD uses forward_kl).
    beta: mixture of `jsd`, skew of `skewed_kl`.
    temperature: > 0.
    vocab_size: ids that both models share; columns beyond take no part on either side. Default: all of equal heads.
    chunk_rows: rows whose logits are alive at once; default holds them, with the gradients kept, to CHUNK_BYTES.
    backend: "torch", "triton" (a GPU, or the interpreter), or "auto": triton for tensors on a GPU.
    student_form, teacher_form: scale and soft cap of each one's logits.

    Raises ValueError: unequal heads without `vocab_size`, a label outside it, no teacher, wrong divergence, beta, backend.
    """
    vocab_size = shared_width(student_head, teacher_head, vocab_size)
    if teacher_hidden is None and bool((kl_weight != 0).any()):
        raise ValueError("kl_weight asks for a divergence, but teacher_hidden is None; give a teacher or zero weights")
    kernel, dtype = _kernel(backend, student_hidden), operand_dtype(student_hidden)
    how: Scoring = (resolve(divergence, beta), beta, temperature, (student_form, teacher_form))
    teacher_weight = None if teacher_head is None else teacher_head[:vocab_size].detach().to(dtype)

    def score(
        logits: Tensor, out: Tensor, ce_weight: Tensor, kl_weight: Tensor, labels: Tensor, taught: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if taught is not None and teacher_weight is not None:
            # Zeros where nothing is distilled: a zero weight alone would turn an overflowed teacher into NaN gradients.
            taught = product(taught.where(kl_weight[:, None] != 0, 0).to(dtype), teacher_weight.T)
        return kernel(logits, taught, labels, ce_weight, kl_weight, how, out)

    given = [labels] if teacher_hidden is None or teacher_head is None else [labels, teacher_hidden.detach()]
    return Sweep(score, vocab_size, chunk_rows, given).losses(student_hidden, student_head, ce_weight, kl_weight)


class Sweep(NamedTuple):
    """A pass over rows in chunks; `given` [N, ...] are their labels and whatever else `score` wants to know of them."""

    score: Score
    vocab_size: int
    chunk_rows: int | None
    given: list[Tensor]

    def losses(self, hidden: Tensor, head: Tensor, ce_weight: Tensor, kl_weight: Tensor) -> RowLosses:
        """Of the rows that weigh something, zero in the others; raises ValueError where a label has no logit."""
        labels, vocab_size = self.given[0], self.vocab_size
        live = (ce_weight != 0) & (labels != IGNORE_INDEX) | (kl_weight != 0)
        wrong = live & (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))
        count, mistakes = torch.stack([live.sum(), wrong.sum()]).tolist()  # one wait, for the device of the labels
        if mistakes:
            raise ValueError(f"label {int(labels[wrong][0])} lies outside the {vocab_size} ids that count; use -100")
        device = hidden.device
        live = sent(live.nonzero_static(size=count).squeeze(1), device)
        used = [sent(rows, device) for rows in (hidden, ce_weight, kl_weight, *self.given)]
        if count < len(labels):  # else there is no need of copies
            used = [rows.index_select(0, live) for rows in used]
        ce, kl, *rows = _ScoreRows.apply(used[0], head, *used[1:3], self._replace(given=used[3:]).run)
        return RowLosses(ce, kl, *(each.new_zeros(len(labels)).index_copy_(0, live, each) for each in rows))

    def run(
        self, hidden: Tensor, head: Tensor, ce_weight: Tensor, kl_weight: Tensor, wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(CE [N], divergence [N], gradients to hidden and head or None)."""
        dtype, exact, narrow = operand_dtype(hidden), exact_dtype(hidden), gradient_dtype(hidden)
        default = rows_at_once(self.vocab_size, narrow.itemsize, head.device.type)
        chunk_rows = default if self.chunk_rows is None else self.chunk_rows
        count, together = len(hidden), GRADIENT_CHUNKS * chunk_rows
        weights = ce_weight.to(exact), kl_weight.to(exact)
        weight = head[: self.vocab_size].to(dtype)
        weight_again = weight.to(narrow)
        ce_rows, kl_rows = hidden.new_zeros(2, count, dtype=exact)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_head = torch.empty(head.shape, dtype=exact, device=head.device) if wanted[1] else None
        if grad_head is not None:
            grad_head[self.vocab_size if count else 0 :] = 0
        grads = torch.empty(min(count, together), self.vocab_size, dtype=narrow, device=head.device)
        for first in range(0, count, together):
            block, grad = slice(first, first + together), grads[: count - first]
            rows = [grad, *(each[block] for each in (hidden, ce_rows, kl_rows, *weights, *self.given))]
            for out, chunk, ce, kl, *known in zip(*(each.split(chunk_rows) for each in rows), strict=True):
                ce[:], kl[:] = self.score(product(chunk.to(dtype), weight.T), out, *known)
            if grad_hidden is not None:
                grad_hidden[block] = product(grad, weight_again)
            if grad_head is not None:
                accumulate(grad_head[: self.vocab_size], grad.T, hidden[block].to(narrow), onto=first > 0)
        return ce_rows, kl_rows, grad_hidden, grad_head


class _ScoreRows(torch.autograd.Function):
    """Keeps the gradient of ce + kl; where the two are weighed apart afterwards, a second pass makes it anew."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, ce_weight: Tensor, kl_weight: Tensor, run: Any) -> Any:
        ctx.run = run
        ctx.save_for_backward(hidden, head, ce_weight, kl_weight)
        ce_rows, kl_rows, *ctx.grads = run(hidden, head, ce_weight, kl_weight, ctx.needs_input_grad)
        ctx.mark_non_differentiable(ce_rows, kl_rows)
        return (ce_rows * ce_weight).sum(), (kl_rows * kl_weight).sum(), ce_rows, kl_rows

    @staticmethod
    def backward(ctx: Any, grad_ce: Tensor, grad_kl: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        kept, ctx.grads = ctx.grads, None
        # A sum hands the same gradient to both; read off the pointers, so that no device is waited for.
        if kept and grad_ce.data_ptr() == grad_kl.data_ptr():
            return *(None if grad is None else grad.mul_(grad_ce) for grad in kept), None, None, None
        del kept
        hidden, head, ce_weight, kl_weight = ctx.saved_tensors
        _, _, *grads = ctx.run(hidden, head, ce_weight * grad_ce, kl_weight * grad_kl, ctx.needs_input_grad)
        return *grads, None, None, None


def score_torch(
    raw: Tensor, taught: Tensor | None, labels: Tensor, ce_weight: Tensor, kl_weight: Tensor, how: Scoring, out: Tensor
) -> tuple[Tensor, Tensor]:
    """The portable scorer: CE [n] and divergence [n]; the gradient to the `raw` logits is written to `out` [n, V]."""
    divergence, beta, temperature, forms = how
    raw = raw.detach().requires_grad_()
    with torch.enable_grad():
        logits = form_logits(raw, forms[0])
        ce = F.cross_entropy(logits, labels.where(ce_weight != 0, IGNORE_INDEX), reduction="none")
        kl = 0 * ce
        if taught is not None:
            sides = logits, form_logits(taught, forms[1])
            student, teacher = (torch.log_softmax(side / temperature, dim=-1) for side in sides)
            kl = DIVERGENCES[divergence](student, teacher, beta).sum(-1).where(kl_weight != 0, 0)
        out.copy_(torch.autograd.grad((ce, kl), raw, (ce_weight, kl_weight))[0])
    return ce.detach(), kl.detach()


def form_logits(raw: Tensor, form: LogitForm) -> Tensor:
    """The family's logits."""
    if not form.cap:
        return raw if form.scale == 1 else raw * form.scale
    return torch.tanh(raw * (form.scale / form.cap)) * form.cap


def rows_at_once(vocab_size: int, gradient_bytes: int, device: str) -> int:
    """Rows a chunk such that logits and kept gradients keep to CHUNK_BYTES; whole tiles of a matrix product."""
    row = vocab_size * (8 + GRADIENT_CHUNKS * gradient_bytes)
    rows = max(1, CHUNK_BYTES.get(device, 2**26) // row)
    return rows - rows % _TILE if rows > _TILE else rows


def refuse_second_derivatives() -> None:
    """Called in a backward: with create_graph the result would silently count as a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("this loss has no second derivative; call backward without create_graph=True")


def _kernel(backend: str, hidden: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    double = hidden.dtype == torch.float64
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend {backend!r} is not known; use 'auto', 'torch' or 'triton'")
    if backend == "triton" and double:
        raise ValueError("backend 'triton' computes in float32, but hidden states are float64; use 'torch' or 'auto'")
    if backend == "torch" or (backend == "auto" and (double or not hidden.is_cuda)):
        return score_torch
    from llavakd.ops.rows import score_triton  # imported only where it runs: triton is not on every machine

    return score_triton


def shared_width(student_head: Tensor, teacher_head: Tensor | None, vocab_size: int | None) -> int:
    """How many leading head rows take part; raises ValueError where the two heads leave it open."""
    student, teacher = len(student_head), len(student_head if teacher_head is None else teacher_head)
    if vocab_size is None and student != teacher:
        raise ValueError(f"heads have {student} and {teacher} rows; give vocab_size, how many ids both share")
    width = student if vocab_size is None else vocab_size
    if not 0 < width <= min(student, teacher):
        raise ValueError(f"vocab_size {width} must lie between 1 and the narrower head, {min(student, teacher)}")
    return width
