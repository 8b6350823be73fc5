"""What `plan` says, against real steps of real models on the CPU: FLOPs, memory, tokens, and advice that helps."""

import dataclasses
import json
import re
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, LlavaForConditionalGeneration

from llavakd import plan as plan_module
from llavakd.config import load_recipe, parse_recipe
from llavakd.data.chat import Segment
from llavakd.data.collate import Batch, RowDataset, Source
from llavakd.data.samples import load_samples
from llavakd.losses import rows as rows_module
from llavakd.models.alignment import Pair
from llavakd.models.quantized import quantize
from llavakd.models.student import VisionLanguageModel, build_student, final_hidden, student_config, vision_features
from llavakd.plan import plan_run
from llavakd.train import step as step_module
from llavakd.train.step import StudentModule, TrainState, build_optimizer, train_step

VISUAL, TEXT, RESPONSE = 48, 80, 40  # tokens of every row: 7 x 7 patches less one, and text, half of it answered
ROWS = 6
DISTILLED = {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}
BOTH = ["projector", "language_model"]
# train, losses, precision, checkpointing, logits of a chunk
KINDS = {
    "dpt": (["projector"], DISTILLED, "bf16", False),
    "sft recomputed": (BOTH, {"ce": 1.0}, "bf16", True),
    "dft": (BOTH, DISTILLED, "bf16", False),
    "all parts": (["vision_tower", *BOTH], {"ce": 1.0}, "fp32", False),
}


def language_model(width, inner, layers, heads, kv_heads, vocabulary, *, tied=True):
    return {
        "model_type": "qwen2",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
    }


def write_configs(folder: Path) -> dict[str, str]:
    """config.json files alone: a tower, a language model, and a LLaVA teacher with the same tower and a wider head."""
    tower = {"model_type": "siglip_vision_model", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
    tower |= {"num_attention_heads": 4, "image_size": 56, "patch_size": 8}
    teacher = {"model_type": "llava", "vision_config": tower | {"vision_use_head": False}, "image_token_index": 7}
    teacher |= {"text_config": language_model(256, 640, 6, 8, 8, 3072), "image_seq_length": VISUAL}
    teacher |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": True}
    student = language_model(192, 512, 5, 6, 2, 3000)
    for name, config in (("tower", tower), ("student", student), ("teacher", teacher)):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return {name: str(folder / name) for name in ("tower", "student", "teacher")}


def recipe_of(parts, kind, **changes):
    train, losses, precision, checkpointing = KINDS[kind]
    stage = {"name": "one", "data": "rows", "train": train, "losses": losses, "learning_rate": 1.0e-4}
    tree = {
        "name": "planned",
        "student": {"vision_tower": parts["tower"], "language_model": parts["student"]},
        "teacher": {"path": parts["teacher"]},
        "data": {"rows": {"path": "nowhere.json", "images": "images", "max_length": VISUAL + TEXT}},
        "stages": [stage | {"global_batch_size": ROWS} | changes],
        "precision": precision,
        "gradient_checkpointing": checkpointing,
    }
    return parse_recipe(tree)


def planned_stage(recipe, rows=ROWS):
    return plan_run(recipe, rows=rows, text_tokens=TEXT)["stages"][0]


def real_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 3000, (ROWS, VISUAL + TEXT), generator=generator)
    segments = torch.full(ids.shape, int(Segment.PROMPT), dtype=torch.uint8)
    segments[:, 3 : 3 + VISUAL] = int(Segment.VISUAL)
    segments[:, -RESPONSE:] = int(Segment.RESPONSE)
    segments[0, -1] = int(Segment.PADDING)  # with padding a mask is made, as in nearly every real batch
    return Batch(
        input_ids=ids,
        attention_mask=(segments != Segment.PADDING).long(),
        labels=ids.where(segments == Segment.RESPONSE, -100),
        segments=segments,
        visual=segments == Segment.VISUAL,
        image_rows=torch.arange(ROWS),
        pixel_values=torch.randn(ROWS, 3, 56, 56, generator=generator),
    )


def whole(config, attention: str) -> VisionLanguageModel:
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=attention).float()
    return VisionLanguageModel(model=model, tokenizer=None, image_processor=None)


def real_state(recipe, attention: str) -> TrainState:
    """What the pipeline would train with, weights drawn at random."""
    torch.set_num_threads(1)
    stage = recipe.stages[0]
    student = whole(student_config(recipe.student), attention)
    student.train_only(stage.train)
    teacher = None
    if stage.losses.distils:
        teacher = whole(AutoConfig.from_pretrained(recipe.teacher.path), attention)
        teacher.model.requires_grad_(False).eval().to(torch.bfloat16)
    if recipe.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    pair = Pair(vocab_size=3000, shared_tower=True, note="") if teacher else None
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if recipe.precision == "bf16" else "no")
    module = StudentModule(student, stage, 3000 if teacher else None)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, stage))
    student.model.train()
    state = {"accelerator": accelerator, "module": module, "optimizer": optimizer, "student": student}
    return TrainState(**state, teacher=teacher, pair=pair, stage=stage)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    yield write_configs(tmp_path_factory.mktemp("configs"))
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch):
    for device in rows_module.CHUNK_BYTES:  # the portable loss holds more of a chunk than the one on a GPU
        monkeypatch.setitem(rows_module.CHUNK_BYTES, device, 2**16)
    return request.param


def test_flops_are_those_of_a_real_step(parts, kind):
    recipe = recipe_of(parts, kind)
    state = real_state(recipe, "eager")  # the counter does not know the CPU's fused attention
    train_step(state, [real_batch()], step=0)  # makes W^T W of frozen heads
    with FlopCounterMode(display=False) as counter:
        train_step(state, [real_batch()], step=0)
    flops = planned_stage(recipe)["flops"]
    assert sum(flops.values()) == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False) as counter:
        vision_features(state.student.model, real_batch().pixel_values)
    assert flops["vision_tower"] == pytest.approx(counter.get_total_flops(), rel=0.01)


class PeakMode(TorchDispatchMode):
    """The most bytes that were alive at once in storages made while it is on."""

    def __init__(self):
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for key in [key for key, (reference, _) in self.live.items() if reference.expired()]:
            self.now -= self.live.pop(key)[1]
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in given:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
                    self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result


def bytes_of(tensors) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@contextmanager
def kept_bytes(model):
    """Yield a function that says how many bytes autograd still keeps of what ran inside, weights not counted."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = []

    def note(tensor):
        held = tensor.detach()  # itself, an output would keep its own graph alive
        saved.append(weakref.ref(held))  # of layers that nothing follows, it is gone before the end
        return held

    def kept():
        alive = [tensor for one in saved if (tensor := one()) is not None]
        return bytes_of(tensor for tensor in alive if tensor.untyped_storage()._cdata not in own)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def test_memory_is_that_of_a_real_step(parts, kind):
    recipe = recipe_of(parts, kind)
    state = real_state(recipe, "sdpa")
    batch = real_batch()
    model = state.student.model
    train_step(state, [batch], step=0)
    memory = planned_stage(recipe)["memory"]
    held, ours = {*model.parameters(), *model.buffers()}, state.student.parts()["vision_tower"]
    if step_module._tower(state) is not model:  # then the trainer puts its weights into the host's memory
        held -= {*ours.parameters()}
    assert (len(held) < len([*model.parameters(), *model.buffers()])) == kind.startswith("d")
    assert memory["weights"] == bytes_of(held)
    learns = "vision_tower" in recipe.stages[0].train
    # A learning tower's layers past the selected one never get a gradient; the plan does not know that.
    exactly = pytest.approx if learns else lambda value, rel: value
    states = bytes_of(tensor for entry in state.optimizer.state.values() for tensor in entry.values())
    assert memory["optimizer"] == exactly(states, rel=0.05)
    assert memory["teacher"] == (bytes_of(state.teacher.model.parameters()) if state.teacher else 0)

    with state.accelerator.autocast(), torch.set_grad_enabled(learns):
        features = None if learns else vision_features(model, batch.pixel_values)
    visual = batch.segments == Segment.VISUAL
    with state.accelerator.autocast(), kept_bytes(model) as kept:
        if learns:
            features = vision_features(model, batch.pixel_values)
        hidden = final_hidden(model, batch.input_ids, batch.attention_mask, visual, features)
    assert memory["activations"] == pytest.approx(kept(), rel=0.005)
    hidden.sum().backward()
    gradients = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    assert memory["gradients"] == exactly(gradients, rel=0.05)
    model.zero_grad()
    del hidden, features, kept

    with PeakMode() as mode:
        train_step(state, [batch], step=1)
    standing = memory["weights"] + memory["optimizer"] + memory["teacher"]
    assert memory["peak"] - standing == pytest.approx(mode.peak, rel=0.15)


@pytest.mark.parametrize(("kind", "share"), [("dpt", 0.67), ("dft", 0.40), ("sft recomputed", 1.0)])
def test_compiled_layers_keep_less_where_they_are_not_made_again(parts, kind, share):
    recipe = recipe_of(parts, kind)
    usual, compiled = (planned_stage(dataclasses.replace(recipe, compile=on))["memory"] for on in (False, True))
    assert compiled["activations"] == pytest.approx(share * usual["activations"], rel=0.05)
    saved = usual["activations"] - compiled["activations"]
    assert usual["peak"] - compiled["peak"] == pytest.approx(saved)
    for part in ("weights", "teacher", "optimizer", "gradients", "loss"):
        assert usual[part] == compiled[part]
    said = plan_run(dataclasses.replace(recipe, compile=True), rows=ROWS, text_tokens=TEXT)["assumptions"]
    assert any(line.endswith("on an H200: 0.4 where they learn, 0.67 elsewhere") for line in said)


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_a_quantised_teacher_takes_fewer_bytes_and_as_many_products(parts, quantization):
    recipe = recipe_of(parts, "dft")
    changed = dataclasses.replace(recipe, teacher=dataclasses.replace(recipe.teacher, quantize=quantization))
    teacher = real_state(recipe, "sdpa").teacher
    quantize(teacher, "int8")
    exact, stage = planned_stage(recipe), planned_stage(changed)
    assert stage["memory"]["teacher"] == bytes_of(teacher.model.parameters())
    assert stage["memory"]["teacher"] < 0.75 * exact["memory"]["teacher"]
    saved = exact["memory"]["teacher"] - stage["memory"]["teacher"]
    assert exact["memory"]["peak"] - stage["memory"]["peak"] == saved
    assert stage["flops"] == exact["flops"]
    assert (
        plan_run(changed, rows=ROWS, text_tokens=TEXT)["parameters"]
        == plan_run(recipe, rows=ROWS, text_tokens=TEXT)["parameters"]
    )


def test_the_plan_says_when_a_drift_is_measured(tiny, command, tmp_path):
    recipe = tiny.recipe(tmp_path / "r.yaml")
    said = (
        "its fp8 products are counted at the bf16 rate; how far it drifts is measured when a stage that distils begins"
    )
    for kind in ("fp8", "none"):
        done = command("plan", recipe, f"teacher.quantize={kind}")
        assert done.code == 0, done.err
        assert (said in done.err) == (kind == "fp8")


def test_a_stored_teacher_is_neither_held_nor_run(tiny, command, tmp_path):
    tree = tiny.tree()
    for stage in tree["stages"]:
        stage["losses"].pop("relation", None)
    recipe, there = tiny.recipe(tmp_path / "r.yaml", tree), []
    for words in ([], [f"teacher.cache={tmp_path}"]):
        done = command("plan", recipe, *words, "--json")
        assert done.code == 0, done.err
        there.append(json.loads(done.out))
    with_teacher, stored = (answer["stages"][2] for answer in there)
    assert with_teacher["memory"]["teacher"] > 0 == stored["memory"]["teacher"]
    assert with_teacher["flops"]["teacher"] > 0 == stored["flops"].get("teacher", 0)
    assert stored["flops"]["student_forward"] == with_teacher["flops"]["student_forward"]
    assert any("read from its cache" in line for line in there[1]["assumptions"])


def real_pack() -> Batch:
    """Half of the rows one behind the other."""
    rows, half = real_batch(), ROWS // 2
    lines = {name: getattr(rows, name)[:half].reshape(1, -1) for name in ("input_ids", "labels", "segments", "visual")}
    lines["position_ids"] = torch.arange(VISUAL + TEXT).repeat(half)[None]
    lines["attention_mask"] = torch.ones_like(lines["position_ids"])
    return dataclasses.replace(rows, **lines, image_rows=torch.arange(half), pixel_values=rows.pixel_values[:half])


def test_a_packed_stage_is_planned_by_its_tokens(parts, kind):
    """FLOPs, for every position meets the whole pack, and what autograd keeps, of a real pack."""
    recipe = recipe_of(parts, kind, max_tokens_per_batch=ROWS // 2 * (VISUAL + TEXT))
    stage, pack = planned_stage(recipe), real_pack()
    assert (stage["micro_batch_size"], stage["accumulation"]) == (ROWS // 2, 2)
    state = real_state(recipe, "eager")
    train_step(state, [pack, pack], step=0)
    with FlopCounterMode(display=False) as counter:
        train_step(state, [pack, pack], step=0)
    assert sum(stage["flops"].values()) == pytest.approx(counter.get_total_flops(), rel=0.05)

    model = real_state(recipe, "sdpa").student.model
    visual, learns = pack.segments == Segment.VISUAL, "vision_tower" in recipe.stages[0].train
    with state.accelerator.autocast(), kept_bytes(model) as kept:
        with torch.set_grad_enabled(learns):
            features = vision_features(model, pack.pixel_values)
        _ = final_hidden(model, pack.input_ids, pack.attention_mask, visual, features, pack.position_ids)
    assert stage["memory"]["activations"] == pytest.approx(kept(), rel=0.005)


def test_packs_of_a_step_follow_from_tokens_and_gpus(parts):
    changes = {"global_batch_size": 64, "max_tokens_per_batch": 2 * (VISUAL + TEXT)}
    stage = plan_run(recipe_of(parts, "dft", **changes), gpus=4, rows=640, text_tokens=TEXT)["stages"][0]
    assert (stage["steps"], stage["micro_batch_size"], stage["accumulation"]) == (10, 2, 8)
    padded = changes | {"max_tokens_per_batch": None, "micro_batch_size": 2}
    other = plan_run(recipe_of(parts, "dft", **padded), gpus=4, rows=640, text_tokens=TEXT)["stages"][0]
    assert stage["memory"]["peak"] == pytest.approx(other["memory"]["peak"], rel=0.1)
    assert stage["flops"]["teacher"] > other["flops"]["teacher"]
    # A step's rows that are fewer than a pack may hold are one pack of them.
    changes["max_tokens_per_batch"] = 10**9
    stage = plan_run(recipe_of(parts, "dft", **changes), gpus=4, rows=640, text_tokens=TEXT)["stages"][0]
    assert (stage["micro_batch_size"], stage["accumulation"]) == (16, 1)


def test_advice_for_a_packed_stage_is_a_smaller_pack_that_still_holds_a_row(parts, monkeypatch):
    recipe = recipe_of(parts, "dft", max_tokens_per_batch=ROWS * (VISUAL + TEXT))
    peak = planned_stage(recipe)["memory"]["peak"]
    monkeypatch.setitem(plan_module.GPUS, "toy", (1, peak * 0.75 / 2**30))
    advice = plan_run(recipe, gpu="toy", rows=ROWS, text_tokens=TEXT)["stages"][0]["advice"]
    assert re.fullmatch(r"stages\.one\.max_tokens_per_batch=\d+", advice)
    assert VISUAL + TEXT <= int(advice.partition("=")[2]) < ROWS * (VISUAL + TEXT)


def test_steps_hours_and_accumulation_follow_from_rows_and_gpus(parts):
    recipe = recipe_of(parts, "dpt", global_batch_size=12, micro_batch_size=3, epochs=2.0)
    plan = plan_run(recipe, gpu="H100", gpus=2, efficiency=0.5, rows=100, text_tokens=TEXT)
    stage = plan["stages"][0]
    assert (stage["steps"], stage["micro_batch_size"], stage["accumulation"]) == (100 // 12 * 2, 3, 2)
    assert stage["hours"] == pytest.approx(sum(stage["flops"].values()) / (2 * 989e12 * 0.5) / 3600)
    single = planned_stage(recipe_of(parts, "dpt", global_batch_size=12, micro_batch_size=3), rows=12)
    for part in ("vision_tower", "teacher", "student_forward", "student_backward", "heads"):
        assert stage["flops"][part] == pytest.approx(16 * single["flops"][part])


def test_features_kept_on_disk_cost_the_tower_once_per_picture(parts):
    recipe = recipe_of(parts, "dpt", epochs=3.0)
    cached = planned_stage(type(recipe)(**{**vars(recipe), "cache_features": True}))["flops"]["vision_tower"]
    assert 3 * cached == pytest.approx(planned_stage(recipe)["flops"]["vision_tower"])


def test_a_recipe_is_planned_the_same_each_time(parts):
    recipe = recipe_of(parts, "all parts")  # the layers of a learning tower past the selected one are thrown away
    again = type(recipe)(**{**vars(recipe), "gradient_checkpointing": True})
    memories = [planned_stage(again)["memory"] for _ in range(5)]
    assert memories == memories[:1] * 5


@pytest.mark.parametrize(("kind", "share"), [("dpt", 0.7), ("dft", 0.75), ("all parts", 0.01)])
def test_advice_makes_the_stage_fit_or_says_that_nothing_will(parts, monkeypatch, tmp_path, kind, share):
    recipe = recipe_of(parts, kind)
    peak = planned_stage(recipe)["memory"]["peak"]
    monkeypatch.setitem(plan_module.GPUS, "toy", (1, peak * share / 2**30))
    advice = plan_run(recipe, gpu="toy", rows=ROWS, text_tokens=TEXT)["stages"][0]["advice"]
    if share == 0.01:
        assert "no setting" in advice
        return
    from llavakd.config import dump_recipe

    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    assert re.fullmatch(r"([a-z_.]+=\S+ ?)+", advice)
    changed = load_recipe(tmp_path / "recipe.yaml", advice.split())
    stage = plan_run(changed, gpu="toy", rows=ROWS, text_tokens=TEXT)["stages"][0]
    assert stage["advice"] == ""
    assert stage["memory"]["peak"] <= 0.92 * peak * share


@pytest.mark.parametrize("sharding", ["none", "zero3"])
def test_where_one_row_is_too_much_compiling_is_advised_before_making_layers_again(parts, monkeypatch, sharding):
    """But by ZeRO-3, which refuses it."""
    recipe = recipe_of(parts, "dft", micro_batch_size=1)
    peaks = [
        planned_stage(dataclasses.replace(recipe, **changes))["memory"]["peak"]
        for changes in ({"compile": True}, {"gradient_checkpointing": True}, {})
    ]
    assert max(peaks[:2]) < peaks[2]
    monkeypatch.setitem(plan_module.GPUS, "toy", (1, max(peaks[:2]) / 0.92 / 2**30 + 1e-9))
    recipe = dataclasses.replace(recipe, sharding=sharding)
    advice = plan_run(recipe, gpu="toy", rows=ROWS, text_tokens=TEXT)["stages"][0]["advice"]
    assert advice == ("gradient_checkpointing=true" if sharding == "zero3" else "compile=true")


def test_tokens_are_those_of_the_rendered_rows(tiny, command, tmp_path):
    done = command("plan", tiny.recipe(tmp_path / "r.yaml"), "stages.sft.data=mixed", "--json")
    assert done.code == 0, done.err
    plan = json.loads(done.out)
    recipe = load_recipe(tmp_path / "r.yaml")
    student = build_student(recipe.student, seed=0)
    for index, name in ((0, "pretrain"), (1, "mixed"), (2, "instruct")):
        data, tokens = recipe.data[name], plan["stages"][index]["tokens"]
        source = Source(samples=load_samples(data), renderer=student.renderer(data), data=data)
        rows = RowDataset([source], image_processor=None)
        texts = [row.text for row in rows.__getitems__(range(len(rows)))]
        assert tokens["rows"] == len(texts)
        assert tokens["longest"] == max(len(text.ids) for text in texts)
        assert tokens["visual"] + tokens["text"] == pytest.approx(sum(len(text.ids) for text in texts) / len(texts))
        answered = sum(text.segments.count(Segment.RESPONSE) for text in texts) / len(texts)
        assert tokens["response"] == pytest.approx(answered)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in student.parts().items()}
    assert plan["parameters"]["student"] == sizes


def test_the_table_warns_of_what_does_not_fit(tiny, command, tmp_path, parts):
    recipe = tiny.recipe(tmp_path / "r.yaml")
    done = command("plan", recipe)
    assert done.code == 0, done.err
    assert "hours on 1 x A100-80" in done.out
    assert "warning" not in done.err
    wide = json.loads(Path(parts["student"], "config.json").read_text()) | {
        "hidden_size": 7680,
        "num_hidden_layers": 80,
    }
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "config.json").write_text(json.dumps(wide | {"intermediate_size": 20480}))
    (tmp_path / "data").mkdir()
    changes = [f"student.language_model={tmp_path / 'wide'}", "student.from_scratch=[]", "data.instruct.path=none.json"]
    done = command("plan", recipe, *changes, "data.pretrain.path=none.json", "--rows", 100, "--gpu", "L4")
    assert done.code == 0, done.err
    assert "warning: stage sft will not fit on L4" in done.err
    assert "assumed: data.instruct: no file none.json" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H10"], "did you mean 'H100'?"),
        (["teacher.path=./none"], "teacher.path: there is no folder './none'"),
        (["student.language_model=./none"], "student.language_model: there is no folder './none'"),
        (["student.vision_tower=./none"], "student.vision_tower: there is no folder './none'"),
        (["data.instruct.path=none.json"], "data.instruct.path: there is no file 'none.json'; give --rows"),
        (["stages.sft.data=world"], "no source 'world'"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_its_key(tiny, command, tmp_path, words, message):
    done = command("plan", tiny.recipe(tmp_path / "r.yaml"), *words)
    assert done.code == 1
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("words", [("--gpus", 0), ("--efficiency", 0), ("--efficiency", 1.5)])
def test_a_number_out_of_its_range_is_refused(tiny, command, tmp_path, words):
    done = command("plan", tiny.recipe(tmp_path / "r.yaml"), *words)
    assert done.code == 1
    assert f"got {words[0]} {words[1]}" in done.err or f"and {words[0]} {float(words[1])}" in done.err
    assert "expected at least 1, and a share up to 1" in done.err
    assert "Traceback" not in done.err


def test_a_stage_of_several_sources_counts_each_by_its_weight(tiny, command, tmp_path):
    recipe = tiny.recipe(tmp_path / "r.yaml")
    alone = {}
    for name in ("mixed", "instruct"):
        done = command("plan", recipe, f"stages.sft.data={name}", "--json")
        alone[name] = json.loads(done.out)["stages"][1]["tokens"]
    done = command("plan", recipe, "stages.sft.data={mixed: 2.5, instruct: 0.5}", "--json")
    assert done.code == 0, done.err
    both = json.loads(done.out)["stages"][1]["tokens"]
    rows = {"mixed": 2.5 * alone["mixed"]["rows"], "instruct": round(0.5 * alone["instruct"]["rows"])}
    assert both["rows"] == sum(rows.values())
    for key in ("visual", "text", "response"):
        assert both[key] == pytest.approx(sum(rows[name] * alone[name][key] for name in rows) / both["rows"])
    for key in ("longest", "most_pictures"):
        assert both[key] == max(one[key] for one in alone.values())


def test_a_pooled_student_is_planned_as_its_tokens_and_its_tower_are(tiny, command, tmp_path):
    recipe = tiny.recipe(tmp_path / "r.yaml")
    plain, pooled = (
        json.loads(command("plan", recipe, "teacher=null", "--json", *more).out)["stages"][1]
        for more in (
            ["stages.dpt.losses={ce: 1.0}", "stages.dft.losses={ce: 1.0}"],
            ["stages.dpt.losses={ce: 1.0}", "stages.dft.losses={ce: 1.0}", "student.projector=pixel_shuffle"],
        )
    )
    assert pooled["tokens"]["visual"] == pytest.approx(plain["tokens"]["visual"] / 4)
    assert pooled["flops"]["vision_tower"] == pytest.approx(plain["flops"]["vision_tower"])
    assert pooled["flops"]["student_forward"] < plain["flops"]["student_forward"]
