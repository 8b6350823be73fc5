"""A trained stage -> a plain transformers folder with a model card, proven to compute what the stage computed."""

import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoProcessor, logging

from llavakd.data.samples import IMAGE_TAG
from llavakd.errors import UserError
from llavakd.models.parts import load
from llavakd.models.student import VisionLanguageModel, load_student, save_model
from llavakd.shapes.world import examples
from llavakd.templates import render
from llavakd.train.checkpoint import write_folder

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What another dtype may change: a logit, by this share of the largest one, and the most likely token, this rarely.
MOST_DIFFERENCE, LEAST_AGREEMENT = 0.1, 0.9
Opened = tuple[VisionLanguageModel, Any]


def open_model(given: str, *, as_stored: bool = False) -> Opened:
    """A run (its last finished stage), a stage, a LLaVA folder or a hub name -> the model and its stock processor.

    Unless `as_stored`, it computes in float32 on a CPU and makes pixels as training did. Raises UserError.
    """
    logging.disable_progress_bar()
    ledger = Path(given) / "pipeline.json"
    if ledger.is_file():
        stages = json.loads(ledger.read_text(encoding="utf-8"))["stages"]
        if not (done := [stage["name"] for stage in stages if stage["state"] == "done"]):
            raise UserError(f"{given} has no finished stage; go on with `llava-kd train`, or name a model folder")
        given = str(ledger.with_name(done[-1]))
    folder = str(inner) if (inner := Path(given) / "model").is_dir() else given
    if (Path(folder) / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds a LoRA adapter; save what peft's merge_and_unload() returns and use that")
    gpu = torch.cuda.is_available()
    student = load_student(folder, dtype="auto" if gpu or as_stored else torch.float32)
    student.model.to("cuda" if gpu else "cpu").eval()
    processor = load(AutoProcessor, folder)
    if not as_stored:
        processor.image_processor = student.image_processor  # the stock one depends on torchvision
    return student, processor


def export_model(given: str, target: Path, *, dtype: str | None = None, license: str = "other") -> str:
    """Write what `given` names (see `open_model`) as a new folder for stock transformers; returns what was done.

    `dtype` is a key of DTYPES; None keeps the stored one, and then the logits are equal bit for bit. `license` is the
    card's. Raises UserError, and leaves nothing, where what was written computes something else.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; give a new folder")
    student, processor = open_model(given, as_stored=True)
    model, tokenizer, old = student.model, student.tokenizer, _logits(student.model, processor)
    chosen = DTYPES[dtype] if dtype else model.dtype
    bound = 0.0 if chosen == model.dtype else MOST_DIFFERENCE
    model.to(chosen)
    tokenizer.chat_template = processor.chat_template
    if isinstance(end := model.generation_config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)  # some tools look at nothing else to end an answer

    def fill(partial: Path) -> str:
        save_model(student, partial, template=None)
        for weights in partial.glob("*.safetensors"):  # written for their owner alone
            weights.chmod((partial / "config.json").stat().st_mode)
        stock = type(model).from_pretrained(partial).to(model.device).eval()
        new = _logits(stock, AutoProcessor.from_pretrained(partial))
        difference = ((old - new).abs().max() / old.abs().max()).item()
        agreement = (old.argmax(-1) == new.argmax(-1)).float().mean().item()
        said = f"logits differ by at most {difference:.2%} of the largest, top-1 agreement {agreement:.1%}"
        if not (difference <= bound and agreement >= LEAST_AGREEMENT):  # NaN, which overflow makes, is not <= anything
            allowed = f"{bound:.0%} and {LEAST_AGREEMENT:.0%}"
            raise UserError(f"not exported: as written, {said}; allowed are {allowed}. Choose another --dtype")
        said = said if difference else "logits equal bit for bit"
        known = {"student": student, "title": target.name, "license": license, "comparison": said}
        (partial / "README.md").write_text(_card(Path(model.name_or_path), known), encoding="utf-8")
        return f"{target}: {model.name_or_path} in {model.dtype}, {said}"

    return write_folder(target, fill)


def push_folder(folder: Path, repository: str, api: Any) -> str:
    """Upload an export to OWNER/NAME, private where it is new, through a huggingface_hub.HfApi; returns its address."""
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder))
    except Exception as error:  # a hub, and the way to it, fail in many ways; none of them undoes the export
        again = f"`hf auth login`, then `hf upload {repository} {folder}`"
        raise UserError(f"cannot push to {repository!r}: {error}. {folder} is whole; try {again}") from error


@torch.no_grad()
def _logits(model: Any, processor: Any) -> torch.Tensor:
    """Float32 logits [8, 8, V] at the last positions of eight drawn pictures with a question each."""
    pictures, questions = zip(*examples(8), strict=True)
    texts = [f"{IMAGE_TAG}\n{question.text}" for question in questions]
    inputs = processor(text=texts, images=list(pictures), padding=True, padding_side="left", return_tensors="pt")
    return model(**inputs.to(model.device, model.dtype), logits_to_keep=8).logits.float()


def _card(folder: Path, known: dict[str, Any]) -> str:
    """The model card; what is known of the run is laid out by the template."""
    stage, files = folder.resolve().parent, ("recipe.yaml", "results.json")
    found = [file.read_text(encoding="utf-8") if (file := stage.parent / name).is_file() else "{}" for name in files]
    # Where things lay on the machine that trained is nobody's business: absolute paths shrink to their last part.
    text = re.sub(r"(?m)^(\s*[\w-]+: ['\"]?)(?:/|~|\.\./).*/(?=[^/\n'\"])", r"\1", found[0])
    known |= {"stage": stage.name, "recipe_text": text, "recipe": yaml.safe_load(text), "results": json.loads(found[1])}
    return render("model_card.md.jinja", **known, exists=lambda path: Path(path).exists())
