"""One step: a gradient that is not finite is named with its rows, and every rank gives every part a gradient."""

import copy
import dataclasses
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from llavakd.config import DataConfig, LossConfig, StageConfig, StudentConfig, TeacherConfig
from llavakd.data.chat import Segment
from llavakd.data.collate import RowDataset, Source, collate, collate_step
from llavakd.data.samples import load_samples
from llavakd.errors import UserError
from llavakd.losses.objective import Counts
from llavakd.models.alignment import align
from llavakd.models.student import build_student, load_teacher, vision_features
from llavakd.train.loop import micro_batch_size, total_steps
from llavakd.train.step import (
    NonFiniteError,
    StudentModule,
    TrainState,
    _tower,
    build_optimizer,
    check_finite,
    park_tower,
    train_step,
)

STAGE = StageConfig(
    name="dft",
    data="mixed",
    train=("projector", "language_model"),
    losses=LossConfig(ce=1.0, response_kl=1.0, visual_kl=1.0, relation=0.5),
    learning_rate=1.0e-3,
    global_batch_size=4,
)


def student_of(tiny, *, own_tower: bool = False):
    return build_student(
        StudentConfig(
            vision_tower=str(tiny.tower if own_tower else tiny.teacher),
            language_model=str(tiny.language_model),
            vision_feature_select_strategy="full",
            from_scratch=("vision_tower", "language_model") if own_tower else ("language_model",),
        ),
        seed=0,
    )


def batch_of(tiny, model, *, pictures: set[int], rows: int = 2, teacher_processor=None):
    data = DataConfig(path=str(tiny.mixed), images=str(tiny.world / "images"), template="chatml", max_length=400)
    samples = [sample for sample in load_samples(data) if len(sample.images) in pictures][:rows]
    processors = {"image_processor": model.image_processor, "teacher_processor": teacher_processor}
    source = Source(samples=samples, renderer=model.renderer(data), data=data)
    dataset = RowDataset([source], **processors)
    return collate([dataset[index] for index in range(rows)], pad_token_id=model.tokenizer.pad_token_id)


@pytest.fixture(params=["shared tower"])
def state(request, tiny):
    """A student and its teacher, ready for a step."""
    student = student_of(tiny, own_tower=request.param == "towers of their own")
    student.train_only(STAGE.train)
    if request.param == "pixels of their own":
        student.image_processor.image_mean = [0.1, 0.5, 0.8]
    teacher = load_teacher(TeacherConfig(path=str(tiny.teacher), dtype="float32"))
    pair = align(student, teacher)
    module = StudentModule(student, STAGE, pair.vocab_size)
    accelerator = Accelerator(cpu=True)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, STAGE))
    yield TrainState(
        accelerator=accelerator,
        module=module,
        optimizer=optimizer,
        student=student,
        teacher=teacher,
        pair=pair,
        stage=STAGE,
    )
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_moves_the_student_and_reports_global_numbers(state, tiny):
    before = {name: p.detach().clone() for name, p in state.student.model.named_parameters()}
    batches = [batch_of(tiny, state.student, pictures={1}), batch_of(tiny, state.student, pictures={0})]
    result = train_step(state, batches, step=0)
    changed = {name for name, p in state.student.model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[1] for name in changed} == {"multi_modal_projector", "language_model"}
    assert result.counted["tokens"] == sum(int(batch.attention_mask.sum()) for batch in batches)
    weights = STAGE.losses.weights
    assert float(result.loss) == pytest.approx(sum(weights[name] * float(v) for name, v in result.parts.items()))
    assert all(float(value) > 0 for value in result.parts.values())
    assert all(p.grad is None for p in state.student.model.parameters())
    assert all(p.grad is None for p in state.teacher.model.parameters())


def stock_logits(model, batch):
    with torch.no_grad():
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        return model.model(**inputs, pixel_values=batch.pixel_values).logits[..., : len(model.tokenizer)].double()


def expected_parts(student, teacher, batch) -> dict[str, float]:
    """The parts by the letter of the paper, each a mean over rows of row means, from the logits of stock models."""
    own = batch.pixel_values if batch.teacher_pixel_values is None else batch.teacher_pixel_values
    ours, theirs = stock_logits(student, batch), stock_logits(teacher, dataclasses.replace(batch, pixel_values=own))
    kl = (theirs.softmax(-1) * (theirs.log_softmax(-1) - ours.log_softmax(-1))).sum(-1)
    sums = dict.fromkeys(("ce", "response_kl", "visual_kl", "relation"), 0.0)
    for row in range(len(ours)):
        answers = [t - 1 for t in range(1, len(batch.labels[row])) if batch.labels[row, t] != -100]
        seen = (batch.segments[row] == Segment.VISUAL).nonzero().squeeze(1)
        sums["ce"] -= sum(ours[row, t].log_softmax(-1)[batch.labels[row, t + 1]] for t in answers) / len(answers)
        sums["response_kl"] += kl[row, answers].mean()
        if len(seen):
            sums["visual_kl"] += kl[row, seen].mean()
            pictures = [[z[row, part] @ z[row, part].T for z in (ours, theirs)] for part in seen.reshape(-1, 16)]
            distances = [1 - (a * b).sum() / (a.norm() * b.norm()) for a, b in pictures]
            sums["relation"] += sum(distances) / len(distances)
    return {name: float(value) / len(ours) for name, value in sums.items()}


def test_a_row_that_was_left_out_changes_nothing_but_its_count(tiny, state):
    """Three rows and a placeholder give the parts, the norm and the tokens of the three rows alone."""
    data = DataConfig(path=str(tiny.mixed), images=str(tiny.world / "images"), template="chatml", max_length=400)
    samples = load_samples(data)
    lost = dataclasses.replace(samples[0], images=("gone.png",))
    renderer = state.student.renderer(data)

    def step(chosen):
        rows = RowDataset(
            [Source(samples=chosen, renderer=renderer, data=data)], image_processor=state.student.image_processor
        )
        batch = collate(rows.__getitems__(range(len(rows))), pad_token_id=0)
        return train_step(dataclasses.replace(state, optimizer=unmoved), [batch], step=0)

    unmoved = build_optimizer(state.module, dataclasses.replace(STAGE, learning_rate=0.0))
    whole, short = step([*samples[:2], lost, samples[20]]), step([*samples[:2], samples[20]])
    assert (whole.counted["left_out"], short.counted["left_out"]) == (1, 0)
    assert whole.counted["tokens"] == short.counted["tokens"]
    for name, value in short.parts.items():
        assert float(whole.parts[name]) == pytest.approx(float(value), rel=1e-5), name
    assert float(whole.grad_norm) == pytest.approx(float(short.grad_norm), rel=1e-5)


@pytest.mark.parametrize("state", ["shared tower", "towers of their own", "pixels of their own"], indirect=True)
def test_the_parts_equal_the_papers_formulas_on_the_logits_of_stock_models(state, tiny):
    """Each model sees its own pixels through its own tower: stock models know no other."""
    assert state.pair.vocab_size == len(state.student.tokenizer) < len(state.student.head)
    own = None if state.pair.shared_pixels else state.teacher.image_processor
    batch = batch_of(tiny, state.student, pictures={0, 1, 2}, rows=32, teacher_processor=own)
    assert own is None or not torch.equal(batch.pixel_values, batch.teacher_pixel_values)
    assert sorted(set(torch.bincount(batch.image_rows, minlength=32).tolist())) == [0, 1, 2]
    expected = expected_parts(state.student, state.teacher, batch)
    parts = train_step(state, [batch], step=0).parts
    assert {name: float(value) for name, value in parts.items()} == pytest.approx(expected, rel=1e-4)


def gradients_of(state, batches):
    """A step's result and the gradient of everything that learns, before clipping; nothing moves."""
    frozen = build_optimizer(state.module, dataclasses.replace(STAGE, learning_rate=0.0))
    grads = {}

    def note(*_):
        grads.update({n: p.grad.double().clone() for n, p in state.module.named_parameters() if p.grad is not None})

    frozen.register_step_pre_hook(note)
    stage = dataclasses.replace(state.stage, max_grad_norm=1e9)
    return train_step(dataclasses.replace(state, optimizer=frozen, stage=stage), batches, step=0), grads


def assert_same_step(one, other):
    (result, grads), (other_result, other_grads) = one, other
    assert result.counted == other_result.counted
    for name, value in {"loss": result.loss, "norm": result.grad_norm, **result.parts}.items():
        wanted = {"loss": other_result.loss, "norm": other_result.grad_norm, **other_result.parts}[name]
        assert float(value) == pytest.approx(float(wanted), rel=2e-6), name
    idle = {name for name in grads.keys() ^ other_grads.keys() if not grads.get(name, other_grads.get(name)).any()}
    assert grads.keys() - idle == other_grads.keys() - idle  # past the selected layer: a gradient of zeros, or none
    for name in grads.keys() - idle:
        grad = other_grads[name]
        scale = max(float(grad.abs().max()), 1e-4 * float(other_result.grad_norm))
        assert float((grads[name] - grad).abs().max()) < 2e-5 * scale, name


PACKED = {
    "one row each": (1, {}),
    "a few rows each": (400, {}),
    "all in one": (10_000, {}),
    "by tokens": (300, {"reduction": "token"}),
    "made again": (300, {}),
    "a tower that learns": (300, {"train": ("vision_tower", "projector", "language_model")}),
    "cross-entropy alone": (300, {"losses": LossConfig(ce=1.0)}),
    "a projector alone": (300, {"train": ("projector",)}),
    "cached features": (300, {}),
}


@pytest.mark.parametrize(
    ("state", "case"),
    [*(("shared tower", case) for case in PACKED), *(("pixels of their own", case) for case in list(PACKED)[:3])],
    indirect=["state"],
)
def test_packs_give_the_parts_and_gradients_of_a_padded_batch(state, tiny, case):
    """Of 32 ragged rows with no, one and two pictures, one of which is left out."""
    tokens, changes = PACKED[case]
    stage = dataclasses.replace(STAGE, **changes)
    state.student.train_only(stage.train)
    if case == "made again":
        state.student.model.train().gradient_checkpointing_enable()
    module = StudentModule(state.student, stage, state.pair.vocab_size)
    state = dataclasses.replace(state, module=module, stage=stage)
    data = DataConfig(path=str(tiny.mixed), images=str(tiny.world / "images"), template="chatml", max_length=400)
    samples = list(load_samples(data))
    samples[7] = dataclasses.replace(samples[7], images=("gone.png",) * len(samples[7].images or "x"))
    own = None if state.pair.shared_pixels else state.teacher.image_processor
    source = Source(samples=samples, renderer=state.student.renderer(data), data=data)
    rows = RowDataset([source], image_processor=state.student.image_processor, teacher_processor=own)
    rows = rows.__getitems__(range(len(rows)))
    if case == "cached features":
        rows = [
            dataclasses.replace(row, pictures={"features": vision_features(state.student.model, held).detach()})
            if (held := row.pictures.get("pixel_values")) is not None
            else row
            for row in rows
        ]
    (padded,) = collate_step(rows, pad_token_id=0, max_tokens=None)
    packs = collate_step(rows, pad_token_id=0, max_tokens=max(tokens, padded.input_ids.shape[1]))
    if tokens == 1:
        packs = [pack for row in rows for pack in collate_step([row], pad_token_id=0, max_tokens=400)]
    assert (len(packs) == 1) == (tokens == 10_000)
    assert padded.attention_mask.sum(1).unique().numel() > 10, "ragged"
    assert len(padded.mistakes) == 1
    wanted = gradients_of(state, [padded])
    assert len(wanted[1]) > (2 if stage.train == ("projector",) else 20)
    assert_same_step(gradients_of(state, packs), wanted)
    if tokens == 300:
        assert_same_step(gradients_of(state, packs[::-1]), wanted)


def test_the_reported_norm_is_the_gradient_before_clipping_and_clipping_holds(state, tiny):
    batch = batch_of(tiny, state.student, pictures={1})
    tight = dataclasses.replace(state, stage=dataclasses.replace(STAGE, max_grad_norm=1e-3))
    grads = []
    state.optimizer.optimizer.register_step_pre_hook(
        lambda *_: grads.append(torch.cat([p.grad.flatten() for p in state.module.parameters() if p.requires_grad]))
    )
    result = train_step(tight, [batch], step=0)
    assert float(result.grad_norm) > 0.1
    assert float(grads[0].norm()) == pytest.approx(1e-3, rel=1e-3)


def test_the_first_gradient_that_is_not_finite_is_named_with_its_rows(state, tiny):
    batch = batch_of(tiny, state.student, pictures={1})
    fine = train_step(state, [batch], step=16)
    check_finite([fine], STAGE)
    with torch.no_grad():
        state.student.model.model.multi_modal_projector.linear_2.weight[0, 0] = torch.inf
    lost = [train_step(state, [batch], step=step) for step in (17, 18)]
    with pytest.raises(NonFiniteError) as error:
        check_finite([fine, *lost], STAGE)
    assert "stage dft, step 17" in str(error.value)
    assert all(name in str(error.value) for name in batch.sample_ids)


@pytest.mark.parametrize("train", [("projector",), ("projector", "language_model"), ("vision_tower", "projector")])
@pytest.mark.parametrize("distils", [False, True])
def test_rows_without_pictures_give_picture_parts_a_gradient_of_zero_not_none(tiny, train, distils):
    student = student_of(tiny)
    student.train_only(train)
    losses = STAGE.losses if distils else LossConfig(ce=1.0)
    stage = dataclasses.replace(STAGE, train=train, losses=losses)
    batch = batch_of(tiny, student, pictures={0})
    taught = head = None
    if distils:
        taught, head = torch.randn(*batch.input_ids.shape, 48), torch.randn(704, 48)
    module = StudentModule(student, stage, len(student.tokenizer))
    result = module(batch, None, taught, head, Counts(2, 50, 0, 0))
    result.total.backward()
    idle = [p for name in ("projector", "vision_tower") for p in student.parts()[name].parameters() if p.requires_grad]
    assert len(idle) >= 4
    assert all(p.grad is not None and not p.grad.any() for p in idle)
    tables = student.head.grad
    assert (tables is None) == ("language_model" not in train)
    assert tables is None or tables.any()


def test_a_learning_tower_is_reached_by_gradients_and_a_frozen_one_is_not(tiny):
    for train, reached in ((("vision_tower", "projector"), True), (("projector",), False)):
        student = student_of(tiny)
        student.train_only(train)
        module = StudentModule(student, dataclasses.replace(STAGE, train=train, losses=LossConfig(ce=1.0)), None)
        module(batch_of(tiny, student, pictures={1}), None, None, None, Counts(2, 50, 32, 2)).total.backward()
        tower = student.parts()["vision_tower"]
        assert (tower.embeddings.patch_embedding.weight.grad is not None) == reached


def test_a_stage_has_whole_global_batches_only_and_at_least_one():
    def steps(rows, epochs):
        return total_steps(rows, dataclasses.replace(STAGE, data="d", global_batch_size=8, epochs=epochs))

    assert (steps(20, 1.0), steps(20, 2.5), steps(8, 0.01)) == (2, 5, 1)
    with pytest.raises(UserError, match=r"'d' has 7 rows.*global_batch_size 8"):
        steps(7, 1.0)


def test_a_global_batch_that_does_not_divide_over_processes_is_refused():
    stage = dataclasses.replace(STAGE, global_batch_size=12, micro_batch_size=3)
    assert micro_batch_size(stage, processes=2) == 3
    assert micro_batch_size(dataclasses.replace(stage, micro_batch_size=None), processes=4) == 3
    with pytest.raises(UserError, match=r"stage dft: global_batch_size 12 .* 8 processes x micro_batch_size 3"):
        micro_batch_size(stage, processes=8)


@pytest.mark.parametrize("changed", [None, "another tower", "float32 teacher", "fp32", "no teacher"])
def test_the_teachers_tower_serves_both_only_where_it_is_the_same_and_as_narrow_as_autocast(state, changed):
    teacher = dataclasses.replace(state.teacher, model=copy.deepcopy(state.teacher.model))
    if changed != "float32 teacher":
        teacher.model.bfloat16()
    accelerator = SimpleNamespace(mixed_precision="no" if changed == "fp32" else "bf16")
    given = (
        {"pair": dataclasses.replace(state.pair, shared_tower=changed != "another tower")}
        if changed != "no teacher"
        else {}
    )
    given |= {"teacher": teacher} if changed != "no teacher" else {"teacher": None, "pair": None}
    state = dataclasses.replace(state, accelerator=accelerator, **given)
    narrow = changed is None
    assert _tower(state) is (teacher if narrow else state.student).model
    before = {name: weight.data_ptr() for name, weight in state.student.model.named_parameters()}
    weights = state.student.parts()["vision_tower"].parameters()
    learns = dataclasses.replace(state.stage, train=("vision_tower", "projector"))
    with patch.object(torch.Tensor, "cpu", lambda weight: weight.clone()):  # as from a GPU
        park_tower(dataclasses.replace(state, stage=learns))
        assert all(weight.data_ptr() == before[name] for name, weight in state.student.model.named_parameters())
        park_tower(state)
    moved = {name for name, weight in state.student.model.named_parameters() if weight.data_ptr() != before[name]}
    assert moved == ({name for name in before if "vision_tower" in name} if narrow else set())
    assert all(weight.dtype == torch.float32 for weight in weights)
