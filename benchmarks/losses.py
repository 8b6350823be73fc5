"""The losses of one distillation step beside the released computation, Liger and the floor, in one process.

    python benchmarks/losses.py --out benchmarks/results/losses.json      # on a GPU
    python benchmarks/losses.py --render benchmarks/results/losses.json   # docs/performance-losses.md and .png

Every contender gets the same final hidden states and heads in bfloat16 and makes the gradients to the student's hidden
states and head. A picture is 729 visual rows and 100 response rows. The floor is the four matrix products that nobody
can leave out, measured in the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llavakd.losses import distill_rows, relation_distance

VISUAL, RESPONSE = 729, 100
PAIRS = {"qwen2.5 3b to 0.5b": (896, 2048), "qwen1.5 4b to 0.5b": (1024, 2560)}  # hidden sizes; vocabulary 151,936
KL_LEVELS = (0.002, 0.05, 0.4)
FLOOR_CHUNK = 4096
Inputs = dict[str, Tensor]


def draw(images: int, sizes: tuple[int, int], vocabulary: int, device: str) -> Inputs:
    """Hidden states [rows, D] of visual rows first, heads [V, D] with logits of std about 3.6, labels [rows]."""
    generator = torch.Generator(device).manual_seed(0)
    rows = images * (VISUAL + RESPONSE)
    made: Inputs = {}
    for side, size in zip(("student", "teacher"), sizes, strict=True):
        made[f"{side}_hidden"] = torch.randn(rows, size, generator=generator, device=device).bfloat16()
        head = torch.randn(vocabulary, size, generator=generator, device=device)
        made[f"{side}_head"] = (3.6 * head / size**0.5).bfloat16()
    labels = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    labels[: images * VISUAL] = -100
    made["labels"] = labels
    for name in ("student_hidden", "student_head"):
        made[name].requires_grad_(True)
    return made


def ours(given: Inputs, images: int, *, relation: bool = True) -> Tensor:
    """Cross-entropy, response KL, visual KL and relation by the public functions."""
    seen = images * VISUAL
    weight = torch.full_like(given["labels"], 1, dtype=torch.float32) / (images * RESPONSE)
    weight[:seen] = 1 / seen
    rows = distill_rows(**given, ce_weight=weight, kl_weight=weight)
    if not relation:
        return rows.ce + rows.kl
    student, teacher = (given[f"{side}_hidden"][:seen].unflatten(0, (images, -1)) for side in ("student", "teacher"))
    distance = relation_distance(student, given["student_head"], teacher, given["teacher_head"])
    return rows.ce + rows.kl + 0.5 * distance.mean()


def reference(given: Inputs, images: int, *, cast: bool = True) -> Tensor:
    """What the released trainer computes: whole logits, kl_div over both kinds of rows, Gram matrices of the logits.

    `cast` as its version of transformers does, whose models hand out float32 logits; newer ones keep bfloat16.
    """
    seen = images * VISUAL
    student = given["student_hidden"] @ given["student_head"].T
    with torch.no_grad():
        teacher = given["teacher_hidden"] @ given["teacher_head"].T
    if cast:
        student, teacher = student.float(), teacher.float()
    visual = [side[:seen].unflatten(0, (images, -1)) for side in (student, teacher)]
    parts = released_parts((student[seen:], teacher[seen:]), (visual[0], visual[1]), given["labels"][seen:])
    return torch.stack(list(parts.values())).sum()


def released_parts(response: tuple[Tensor, Tensor], visual: tuple[Tensor, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The released losses by name, of (student, teacher) logits: response rows [R, V], visual rows [P, N, V]."""
    parts = {"ce": F.cross_entropy(response[0], labels)}
    for name, (student, teacher) in (("response_kl", response), ("visual_kl", visual)):
        total = F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum")
        parts[name] = total / student[..., 0].numel()
    grams = [(side @ side.mT).flatten() for side in visual]
    parts["relation"] = 1 - F.cosine_similarity(grams[0], grams[1], dim=0)
    return parts


def liger_chunked(given: Inputs, images: int) -> Tensor:
    """Liger's chunked loss: KL and CE over all rows (it skips rows without a label), no relation."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0)
    return loss(*(given[name] for name in HEADS), given["labels"].clamp_min(0))


def liger_triton(given: Inputs, images: int) -> Tensor:
    """Liger's Triton loss: KL over all rows, no CE, no relation."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=0.0)(*(given[name] for name in HEADS), None)


HEADS = ("student_hidden", "student_head", "teacher_hidden", "teacher_head")
CONTENDERS: dict[str, Callable[[Inputs, int], Tensor]] = {
    "reference": reference,
    "reference, bf16 logits": lambda given, images: reference(given, images, cast=False),
    "Liger chunked (CE + KL)": liger_chunked,
    "Liger Triton (KL)": liger_triton,
    "ours (CE + KL)": lambda given, images: ours(given, images, relation=False),
    "ours (CE + KL + relation)": ours,
}


def floor(given: Inputs) -> None:
    """Student logits, teacher logits, gradient to hidden states, gradient to the head: four products, in chunks."""
    student_head, teacher_head = given["student_head"].detach(), given["teacher_head"]
    for start in range(0, len(given["labels"]), FLOOR_CHUNK):
        student, teacher = (
            given[f"{side}_hidden"][start : start + FLOOR_CHUNK].detach() for side in ("student", "teacher")
        )
        logits = student @ student_head.T
        teacher @ teacher_head.T
        logits @ student_head
        logits.T @ student


def measure(step: Callable[[], object], device: str, repeats: int, in_a_row: int = 1) -> tuple[float, float]:
    """(median milliseconds, GiB allocated at the peak beyond what stands after a step).

    Of steps `in_a_row` the next is begun before the device is done with the last.
    """
    for _ in range(2):
        step()
    gc.collect()
    cuda = device == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(in_a_row):
            step()
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / in_a_row)
    peak = torch.cuda.max_memory_allocated() - before if cuda else 0
    return statistics.median(times), peak / 2**30


def speed(images: int, pair: str, vocabulary: int, device: str, repeats: int) -> list[dict]:
    """One line a contender: time, ratio to the floor, and memory beyond the inputs and the two gradients handed out."""
    given = draw(images, PAIRS[pair], vocabulary, device)
    floor_ms, _ = measure(lambda: floor(given), device, repeats)
    lines = [{"name": "floor", "ms": floor_ms, "extra_gib": None}]
    for name, loss in CONTENDERS.items():

        def step(loss: Callable[[Inputs, int], Tensor] = loss) -> None:
            given["student_hidden"].grad = given["student_head"].grad = None
            loss(given, images).backward()

        try:
            milliseconds, peak = measure(step, device, repeats)
            lines.append({"name": name, "ms": milliseconds, "extra_gib": peak})
        except (ImportError, torch.OutOfMemoryError, RuntimeError) as error:
            lines.append({"name": name, "failed": f"{type(error).__name__}: {str(error)[:120]}"})
        given["student_hidden"].grad = given["student_head"].grad = None
    return [
        {"pair": pair, "images": images, "rows": len(given["labels"]), "to_floor": line.get("ms", 0) / floor_ms, **line}
        for line in lines
    ]


def near_teacher(given: Inputs, level: float) -> tuple[Tensor, float]:
    """A teacher head so close to the student's that the mean KL is about `level`, by bisection; and that KL."""
    head, hidden = given["student_head"].detach().double(), given["student_hidden"].detach().double()
    noise = torch.randn(head.shape, generator=torch.Generator(head.device).manual_seed(1), device=head.device)
    logq = (hidden @ head.T).log_softmax(-1)
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        taught = (head + middle * noise * head.std()).bfloat16()
        logp = (hidden @ taught.double().T).log_softmax(-1)
        kl = float((logp.exp() * (logp - logq)).sum(-1).mean())
        low, high = (middle, high) if kl < level else (low, middle)
    return taught, kl


def errors(pair: str, vocabulary: int, device: str, rows: int = 256) -> list[dict]:
    """Relative error (norm) of the KL gradient to hidden states and head, against float64 on the same bf16 inputs."""
    size = PAIRS[pair][0]
    given = draw(1, (size, size), vocabulary, device)
    hidden, head = given["student_hidden"][:rows].detach(), given["student_head"].detach()
    found = []
    for level in KL_LEVELS:
        taught, kl = near_teacher({"student_hidden": hidden, "student_head": head}, level)
        exact = [tensor.double().requires_grad_(True) for tensor in (hidden, head)]
        logq, logp = ((exact[0] @ exact[1].T).log_softmax(-1), (hidden.double() @ taught.double().T).log_softmax(-1))
        want = torch.autograd.grad((logp.exp() * (logp - logq)).sum() / rows, exact)
        del logq, logp
        weight = torch.full((rows,), 1 / rows, device=device)
        labels = torch.full((rows,), -100, device=device)
        inputs = [tensor.clone().requires_grad_(True) for tensor in (hidden, head)]
        mine = distill_rows(*inputs, hidden, taught, labels, ce_weight=0 * weight, kl_weight=weight)
        rough = [tensor.clone().requires_grad_(True) for tensor in (hidden, head)]
        plain = F.kl_div(
            (rough[0] @ rough[1].T).float().log_softmax(-1),
            (hidden @ taught.T).float().softmax(-1),
            reduction="batchmean",
        )
        for name, loss, leaves in (("ours", mine.ce + mine.kl, inputs), ("reference", plain, rough)):
            got = torch.autograd.grad(loss, leaves)
            relative = [float((one.double() - two).norm() / two.norm()) for one, two in zip(got, want, strict=True)]
            found.append({"pair": pair, "kl": kl, "name": name, "hidden_error": relative[0], "head_error": relative[1]})
    return found


def environment(device: str) -> dict:
    """What the figures belong to."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "liger_kernel"):
        try:
            versions[name] = __import__("importlib.metadata").metadata.version(name)
        except Exception:
            versions[name] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {**versions, "commit": commit, "device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}


def render(source: Path) -> None:
    """docs/performance-losses.md and .png from a results file."""
    import matplotlib.pyplot as plt

    found = json.loads(source.read_text(encoding="utf-8"))
    environment, docs = found["environment"], Path("docs")
    lines = [
        "# The losses: time, memory, exactness",
        "",
        "Measured in one run: " + ", ".join(f"{key} {value}" for key, value in environment.items()) + ".",
        "",
    ]
    lines += ["| pair | rows | | ms | x floor | extra GiB |", "|---|---|---|---|---|---|"]
    for line in found["speed"]:
        cells = (line["pair"], line["rows"], line["name"])
        if "failed" in line:
            lines.append(f"| {cells[0]} | {cells[1]} | {cells[2]} | {line['failed']} | | |")
            continue
        extra = "" if line["extra_gib"] is None else f"{line['extra_gib']:.2f}"
        lines.append(f"| {cells[0]} | {cells[1]} | {cells[2]} | {line['ms']:.1f} | {line['to_floor']:.2f} | {extra} |")
    lines += ["", "| pair | KL | | error of the gradient to hidden states | to the head |", "|---|---|---|---|---|"]
    for line in found["errors"]:
        share = f"{line['hidden_error']:.3%} | {line['head_error']:.3%}"
        lines.append(f"| {line['pair']} | {line['kl']:.4f} | {line['name']} | {share} |")
    (docs / "performance-losses.md").write_text(
        "\n".join(lines) + "\n\n![time](performance-losses.png)\n", encoding="utf-8"
    )
    pairs = list(dict.fromkeys(line["pair"] for line in found["speed"]))
    figure, axes = plt.subplots(1, len(pairs), figsize=(6 * len(pairs) + 2, 4), squeeze=False, layout="constrained")
    for axis, pair in zip(axes[0], pairs, strict=True):
        for name in dict.fromkeys(line["name"] for line in found["speed"]):
            points = [
                (line["rows"], line["ms"])
                for line in found["speed"]
                if (line["pair"], line["name"]) == (pair, name) and "ms" in line
            ]
            axis.plot(*zip(*points, strict=True), marker="o", label=name) if points else None
        axis.set(title=pair, xlabel="rows", ylabel="milliseconds, forward and backward", yscale="log", xscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    figure.savefig(docs / "performance-losses.png", dpi=150)


def main() -> None:
    """Parse, measure, write JSON after every block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--render", type=Path)
    parser.add_argument("--images", type=int, nargs="+", default=[2, 8, 16])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    if options.render:
        return render(options.render)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict = {"environment": environment(device), "speed": [], "errors": []}
    blocks = [lambda p=pair: ("errors", errors(p, options.vocabulary, device)) for pair in PAIRS]
    blocks += [
        lambda i=images, p=pair: ("speed", speed(i, p, options.vocabulary, device, options.repeats))
        for pair in PAIRS
        for images in options.images
    ]
    for block in blocks:
        part, lines = block()
        found[part] += lines
        for line in lines:
            print(
                {key: round(value, 4) if isinstance(value, float) else value for key, value in line.items()}, flush=True
            )
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
