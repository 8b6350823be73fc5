"""What is exported is what was trained, for programs that have never heard of us."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llavakd
from llavakd.errors import UserError
from llavakd.export import export_model, push_folder

TRAINED = Path(llavakd.__file__).parent / "assets" / "shapes" / "teacher"
QUESTION = "what is in the south?"

# A stranger's program: our package cannot be imported, and only folders are known.
STRANGER = """
import json, sys
sys.modules["llavakd"] = None
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

def generate(folder):
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    chats = processor.chat_template is not None
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True) if chats else "<image>"
    inputs = processor(text=prompt, images=Image.open(picture).convert("RGB"), return_tensors="pt")
    output = model.generate(**inputs.to(model.dtype), max_new_tokens=12, do_sample=False)
    return [output[0].tolist(), str(model.dtype), type(model).__name__]

picture, question, *folders = sys.argv[1:]
said = [generate(folder) for folder in folders]
try:
    import llavakd
except ImportError:
    print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def run(tiny, command, tmp_path_factory):
    """A finished run of three stages, evaluated; nobody may change it."""
    folder = tmp_path_factory.mktemp("run")
    tree = tiny.tree() | {"evaluation": {"data": "test", "batch_size": 12, "max_new_tokens": 3}}
    done = command("train", tiny.recipe(folder / "recipe.yaml", tree), "--out", folder / "trained")
    assert done.code == 0, done.err
    return folder / "trained"


@pytest.fixture
def picture(tiny):
    return sorted((tiny.world / "images").iterdir())[0]


def tokens(folder, picture, *, dtype="auto"):
    """Ids that stock transformers generates from a folder, asked as STRANGER asks."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    turns = [{"role": "user", "content": content}]
    chats = processor.chat_template is not None
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True) if chats else "<image>"
    inputs = processor(text=prompt, images=Image.open(picture).convert("RGB"), return_tensors="pt")
    return model.generate(**inputs.to(model.dtype), max_new_tokens=12, do_sample=False)[0].tolist()


def logits(folder, picture):
    """Logits at all positions of a picture with a question."""
    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    inputs = processor(text=f"<image>\n{QUESTION}", images=Image.open(picture).convert("RGB"), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs.to(model.dtype)).logits


def copy_of(folder, target, **config):
    """A LLaVA folder that may be changed."""
    shutil.copytree(folder, target)
    if config:
        settings = json.loads((target / "config.json").read_text(encoding="utf-8"))
        (target / "config.json").write_text(json.dumps(settings | config), encoding="utf-8")
    return target


def test_a_program_without_our_package_generates_the_same_tokens(run, picture, tmp_path, command):
    sources = {
        run: run / "dft" / "model",
        run / "sft": run / "sft" / "model",
        run / "dpt" / "model": run / "dpt" / "model",
        TRAINED: TRAINED,
    }
    plain = [tmp_path / f"plain-{number}" for number in range(len(sources))]
    for given, target in zip(sources, plain, strict=True):
        done = command("export", given, target)
        assert done.code == 0, done.err
        assert "equal bit for bit" in done.out
    program = [sys.executable, "-c", STRANGER, picture, QUESTION, *plain]
    stranger = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert stranger.returncode == 0, stranger.stderr
    dtypes = ["torch.float32"] * 3 + ["torch.float16"]
    for folder, dtype, said in zip(sources.values(), dtypes, json.loads(stranger.stdout), strict=True):
        assert said == [tokens(folder, picture), dtype, "LlavaForConditionalGeneration"]


def test_stages_differ_so_that_taking_the_wrong_one_would_show(run, picture):
    first, second, third = (logits(run / stage / "model", picture) for stage in ("dpt", "sft", "dft"))
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)


def test_the_same_dtype_gives_the_same_logits_and_weights_bit_for_bit(run, picture, tmp_path):
    export_model(str(run), tmp_path / "plain")
    assert torch.equal(logits(tmp_path / "plain", picture), logits(run / "dft" / "model", picture))
    old, new = (load_file(folder / "model.safetensors") for folder in (run / "dft" / "model", tmp_path / "plain"))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_the_folder_says_what_other_tools_look_for(tmp_path):
    export_model(str(TRAINED), tmp_path / "plain")
    config, generation, words, pixels = (
        json.loads((tmp_path / "plain" / name).read_text(encoding="utf-8"))
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json")
    )
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["dtype"] == "float16"
    processor = AutoProcessor.from_pretrained(tmp_path / "plain")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert generation["eos_token_id"] == end
    assert generation["pad_token_id"] == processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert words["eos_token"] == "<|im_end|>"  # lmms-eval's llava_hf ends answers there
    assert pixels["image_processor"]["image_processor_type"] == "SiglipImageProcessor"
    assert (pixels["patch_size"], pixels["vision_feature_select_strategy"]) == (16, "full")
    readable = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "plain").iterdir()}
    assert set(readable) >= {"README.md", "chat_template.jinja", "model.safetensors", "tokenizer.json"}
    assert len(set(readable.values())) == 1


def test_a_question_as_one_string_with_its_tag_is_rendered_like_one_in_parts(tmp_path):
    export_model(str(TRAINED), tmp_path / "plain")
    processor = AutoProcessor.from_pretrained(tmp_path / "plain")
    parts = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    texts = [
        renderer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
        for renderer, content in ((processor, parts), (processor.tokenizer, f"<image>\n{QUESTION}"))
    ]
    assert texts[0] == texts[1] == f"<|im_start|>user\n<image>\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_narrower_dtype_says_how_far_its_logits_are(run, picture, tmp_path, command, name, dtype):
    done = command("export", run, tmp_path / "plain", "--dtype", name)
    assert done.code == 0, done.err
    weights = load_file(tmp_path / "plain" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    source = load_file(run / "dft" / "model" / "model.safetensors")
    assert all(torch.equal(weights[key], source[key].to(dtype)) for key in source)
    assert "equal bit for bit" not in done.out
    said = done.out.partition("logits differ by at most ")[2].strip()
    assert 0 < float(said.partition("%")[0]) < 10
    assert f"| export | logits differ by at most {said} |" in (tmp_path / "plain" / "README.md").read_text()


def test_what_overflows_in_the_narrower_dtype_is_refused_and_nothing_is_left(run, tmp_path, command):
    large = copy_of(run / "dft" / "model", tmp_path / "large")
    weights = load_file(large / "model.safetensors")
    (name,) = (key for key in weights if key.endswith("model.norm.weight"))
    save_file(weights | {name: weights[name] * 1e6}, large / "model.safetensors", metadata={"format": "pt"})
    refused = command("export", large, tmp_path / "out" / "plain", "--dtype", "fp16")
    assert refused.code == 1
    assert "not exported" in refused.err
    assert "allowed are 10% and 90%" in refused.err
    assert "Traceback" not in refused.err
    assert list((tmp_path / "out").iterdir()) == []
    assert command("export", large, tmp_path / "out" / "plain", "--dtype", "bf16").code == 0


def test_a_folder_that_reads_back_otherwise_is_refused(run, tmp_path, monkeypatch):
    def damaged(student, folder, *, template):
        with torch.no_grad():
            student.model.lm_head.weight[0] += 1e-3
        save(student, folder, template=template)

    save = llavakd.export.save_model
    monkeypatch.setattr(llavakd.export, "save_model", damaged)
    with pytest.raises(UserError, match=r"not exported: .* allowed are 0%"):
        export_model(str(run), tmp_path / "plain")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_and_a_full_one_is_left_alone(run, tmp_path, command):
    (tmp_path / "empty").mkdir()
    assert command("export", run, tmp_path / "empty").code == 0
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "empty").iterdir())
    refused = command("export", run, tmp_path / "empty")
    assert refused.code == 1
    assert "is not empty; give a new folder" in refused.err
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "empty").iterdir()) == before
    (tmp_path / "file").touch()
    assert "is not empty" in command("export", run, tmp_path / "file").err
    assert "cannot write" in command("export", run, tmp_path / "file" / "below").err


def test_a_run_gives_its_last_finished_stage(run, picture, tmp_path):
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    ledger = json.loads((begun / "pipeline.json").read_text(encoding="utf-8"))
    ledger["stages"][2]["state"] = "running"
    (begun / "pipeline.json").write_text(json.dumps(ledger), encoding="utf-8")
    export_model(str(begun), tmp_path / "plain")
    assert torch.equal(logits(tmp_path / "plain", picture), logits(run / "sft" / "model", picture))


@pytest.mark.parametrize("case", ["nothing", "unfinished run", "adapter", "another model"])
def test_what_cannot_be_exported_is_named(run, tiny, tmp_path, command, case):
    given = tmp_path / "given"
    if case == "unfinished run":
        given.mkdir()
        (given / "pipeline.json").write_text('{"name": "x", "stages": [{"name": "dpt", "state": "running"}]}')
    elif case == "adapter":
        given.mkdir()
        (given / "adapter_config.json").write_text("{}")
    elif case == "another model":
        given = tiny.language_model
    refused = command("export", given, tmp_path / "plain")
    said = {
        "nothing": "there is no folder",
        "unfinished run": "has no finished stage; go on with `llava-kd train`",
        "adapter": "holds a LoRA adapter; save what peft's merge_and_unload() returns",
        "another model": "holds a 'qwen2' model, expected",
    }
    assert refused.code == 1
    assert said[case] in refused.err
    assert str(given) in refused.err
    assert "Traceback" not in refused.err
    assert not (tmp_path / "plain").exists()
    assert command("export", run, tmp_path / "plain", "--dtype", "int8").code == 2


def test_the_card_tells_a_hub_and_a_reader_what_is_known(run, tiny, tmp_path):
    export_model(str(run), tmp_path / "plain", license="apache-2.0")
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    facts = card.data.to_dict()
    assert facts["license"] == "apache-2.0"
    assert facts["library_name"] == "transformers"
    assert facts["pipeline_tag"] == "image-text-to-text"
    assert "base_model" not in facts  # the parts are folders of this machine
    rows = json.loads((run / "results.json").read_text(encoding="utf-8"))["rows"]
    (own,) = (row for row in rows if row["name"] == "tiny")
    assert [result.metric_value for result in card.data.eval_results] == [own["accuracy"]]
    assert card.data.eval_results[0].dataset_name == "test.json"
    for said in (
        "stage `dft` of the recipe `tiny`",
        f"| tiny (this model) | {own['accuracy']:.1%} |",
        "| teacher | `teacher` |",
        "| `dft` | instruct | projector, language_model | 1.0 ce + 1.0 response_kl + 1.0 visual_kl + 0.5 relation |",
        "| instruct | `instruct.json` | `images` | chatml |",
        "| export | logits equal bit for bit |",
        "learning_rate: 0.001",
    ):
        assert said in card.text
    assert str(tiny.root) not in card.content
    assert "/tmp" not in card.content


def test_the_cards_code_runs(tmp_path, picture, monkeypatch, capsys):
    export_model(str(TRAINED), tmp_path / "plain")
    code = (tmp_path / "plain" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code.replace("What is in the picture?", QUESTION).replace("picture.png", str(picture)), {})
    said = AutoProcessor.from_pretrained(TRAINED).decode(tokens(TRAINED, picture), skip_special_tokens=True)
    assert said.rpartition("assistant\n")[2].strip() == capsys.readouterr().out.strip() != ""


def test_the_card_of_a_stage_that_learnt_captions_shows_a_bare_prompt(run, tmp_path):
    export_model(str(run / "dpt"), tmp_path / "plain")
    assert 'prompt = "<image>"' in (tmp_path / "plain" / "README.md").read_text()


def test_an_earlier_stages_card_has_no_scores_of_the_last_one_and_no_later_stage(run, tmp_path):
    export_model(str(run / "sft"), tmp_path / "plain")
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.eval_results is None
    assert "None recorded for this model." in card.text
    assert "| `sft` |" in card.text
    assert "| `dft` |" not in card.text


def test_hub_names_of_the_parts_are_base_models_and_the_licence_is_asked_for(run, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(run, named)
    recipe = (named / "recipe.yaml").read_text(encoding="utf-8")
    for part, name in {"vision_tower": "google/siglip", "language_model": "Qwen/Qwen2.5-0.5B"}.items():
        old = next(line for line in recipe.splitlines() if line.startswith(f"  {part}: "))
        recipe = recipe.replace(old, f"  {part}: {name}")
    (named / "recipe.yaml").write_text(recipe, encoding="utf-8")
    export_model(str(named), tmp_path / "plain")
    card = ModelCard.load(tmp_path / "plain" / "README.md")
    assert card.data.base_model == ["google/siglip", "Qwen/Qwen2.5-0.5B"]
    assert card.data.license == "other"
    assert "(not stated at export)" in card.text


class Hub:
    """Stands in for huggingface_hub.HfApi."""

    def __init__(self, error=None):
        self.calls, self.error = [], error

    def create_repo(self, repository, **options):
        self.calls.append((repository, options))
        if self.error:
            raise self.error

    def upload_folder(self, **options):
        self.calls.append(options)
        return f"https://hub/{options['repo_id']}"


def test_pushing_makes_a_private_repository_and_uploads_the_folder(tmp_path):
    hub = Hub()
    assert push_folder(tmp_path, "me/model", hub) == "https://hub/me/model"
    assert hub.calls == [
        ("me/model", {"private": True, "exist_ok": True}),
        {"repo_id": "me/model", "folder_path": tmp_path},
    ]


def test_a_hub_that_refuses_is_named_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"'me/model': no token.* is whole; try `hf auth login`.*hf upload me/model"):
        push_folder(tmp_path, "me/model", Hub(OSError("no token")))
    with pytest.raises(UserError, match="cannot push to 'not/a/name'"):
        push_folder(tmp_path, "not/a/name", HfApi())  # refused by the client itself, without a network
