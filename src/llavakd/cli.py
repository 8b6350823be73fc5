"""Distil a large vision-language model into a small one: dpt, sft, dft."""

import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from rich.console import Console
from rich.markdown import Markdown

import llavakd
from llavakd import config
from llavakd.errors import UserError
from llavakd.progress import Interrupted, say
from llavakd.templates import render

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
OPTIONS = yaml.safe_load((Path(__file__).parent / "assets" / "options.yaml").read_text(encoding="utf-8"))
DtypeName = Literal["bf16", "fp16", "fp32"]
ARGUMENTS = ("recipe", "overrides", "question")  # though they have defaults


def quickstart(out: Path = Path("quickstart")) -> None:
    """Run the three stages and their equal-step control on the built-in miniature world, on the CPU, and report."""
    _show("results.md.jinja", llavakd.run_quickstart(out))
    typer.echo(render("quickstart.jinja", out=out))


def train(recipe: Path, overrides: list[str] | None = None, out: Path | None = None) -> None:
    """Run or go on with the stages of RECIPE."""
    loaded = config.load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    results = llavakd.run_pipeline(loaded, folder)
    if results["rows"]:  # without `evaluation`, and on all processes but the first, there is nothing to show
        _show("results.md.jinja", results)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes one tells
        typer.echo(f"Done: {folder}" + (f", report in {folder / 'report.html'}" if results["rows"] else ""))


def cache(
    recipe: Path, overrides: list[str] | None = None, out: Path | None = None, top_k: int = 64, visual: float = 0.25
) -> None:
    """Write what the teacher of RECIPE says into its teacher.cache: training then needs no teacher in memory."""
    loaded = config.load_recipe(recipe, overrides or [])
    if not loaded.teacher or not loaded.teacher.cache:
        raise UserError("the recipe has no teacher.cache, the folder to write; add it: teacher.cache=DIR")
    llavakd.run_pipeline(loaded, out or Path("runs") / loaded.name, cache={"top_k": top_k, "visual_share": visual})
    typer.echo(f"Done: {loaded.teacher.cache}")


def plan(
    recipe: Path,
    overrides: list[str] | None = None,
    gpu: str = "A100-80",
    gpus: int = 1,
    efficiency: float = 0.4,
    rows: int | None = None,
    text_tokens: int | None = None,
    as_json: bool = False,
) -> None:
    """Say what RECIPE would cost, without weights: parameters, tokens, FLOPs, memory and hours of every stage."""
    loaded = config.load_recipe(recipe, overrides or [])
    plan = llavakd.plan_run(loaded, gpu=gpu, gpus=gpus, efficiency=efficiency, rows=rows, text_tokens=text_tokens)
    _show("plan.md.jinja", plan, as_json)
    for note in [] if as_json else render("plan_notes.jinja", answer=plan).splitlines():
        say(note)


def check(
    recipe: Path | None = None,
    overrides: list[str] | None = None,
    data: Path | None = None,
    images: Path | None = None,
    fast: bool = False,
    workers: int | None = None,
    report: Path | None = None,
    write_clean: Path | None = None,
    out: Path | None = None,
    as_json: bool = False,
) -> None:
    """Look at every row before anything trains; exit 1 if some cannot be used."""
    if recipe and not (data or write_clean):
        loaded = config.load_recipe(recipe, overrides or [])
        found = llavakd.check_recipe(loaded, out or Path("runs") / loaded.name, fast=fast, workers=workers)
    elif data and not recipe:
        source = config.DataConfig(path=str(data), images=str(images) if images else None)
        found = {data.name: llavakd.check_source(source, fast=fast, workers=workers, clean=write_clean)}
    else:
        raise UserError("give either a recipe or --data FILE; --write-clean goes with --data")
    if report:
        report.write_text(json.dumps(found, ensure_ascii=False) + "\n", encoding="utf-8")
    _show("check.md.jinja", found, as_json)
    if any(source["unusable"] for source in found.values()):
        sys.exit(1)


def shapes(
    directory: Path, scenes: int = 2000, seed: int = 0, test_questions: int = 1000, noise: float = 0.0, workers: int = 1
) -> None:
    """Write the built-in miniature world as a LLaVA-format folder."""
    world = config.WorldConfig(scenes=scenes, seed=seed, test_questions=test_questions, noise=noise)
    pictures, rows = llavakd.write_world(directory, world, workers=workers)
    typer.echo(f"{directory}: {pictures} pictures, rows {rows}")


def evaluate(
    model: str,
    data: Path | None = None,
    images: Path | None = None,
    template: config.TemplateName | None = None,
    metric: config.MetricName = "exact_match",
    tasks: str | None = None,
    include: Path | None = None,
    limit: int | None = None,
    out: Path = Path("eval"),
    batch_size: int = 64,
    max_new_tokens: int = 128,
    as_json: bool = False,
) -> None:
    """Answer and score a question file, or benchmarks through lmms-eval."""
    if bool(data) == bool(tasks):
        raise UserError("got both --data and --tasks, or neither; give a question file or names of benchmarks")
    try:
        if tasks:
            from llavakd.evaluate.lmms import evaluate_tasks
    except ImportError as error:
        how = "pip install 'llava-kd[eval]' and then pip install --no-deps lmms-eval==0.7.3"
        raise UserError(f"--tasks: {error}; run {how}") from error
    source, form = config.TeacherConfig(path=model, dtype="float32"), template or llavakd.template_of(model)
    questions = config.DataConfig(path=str(data or ""), images=str(images) if images else None, template=form)
    asked = config.EvaluationConfig(data="data", metric=metric, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if tasks:
        names = tasks.replace(" ", "").split(",")
        row = evaluate_tasks(source, names, questions, asked, out, include=include, limit=limit)
        _show("benchmarks.md.jinja", row, as_json)
    else:
        _show("results.md.jinja", llavakd.evaluate_folder(source, questions, asked, out, limit=limit), as_json)


def report(runs: list[Path], out: Path | None = None) -> None:
    """Write results.json, report.md and report.html from one or more runs."""
    folder = out or runs[0]
    _show("results.md.jinja", llavakd.write_report(runs, folder))
    typer.echo(f"Report: {folder / 'report.html'}")


def convert(source: Path, target: Path, tokenizer: str | None = None, vision_tower: str | None = None) -> None:
    """Write a checkpoint of another project as a transformers folder that computes the same."""
    typer.echo(llavakd.convert(source, target, tokenizer=tokenizer, vision_tower=vision_tower))


def export(
    model: str, target: Path, dtype: DtypeName | None = None, license: str = "other", push: str | None = None
) -> None:
    """Write a trained model as a plain transformers folder with a model card, its logits compared before and after."""
    from huggingface_hub import HfApi

    typer.echo(llavakd.export_model(model, target, dtype=dtype, license=license))
    if push:
        typer.echo(llavakd.push_folder(target, push, HfApi()))


def chat(model: str, image: Path, question: str | None = None, max_new_tokens: int = 512) -> None:
    """Ask a model about a picture."""
    llavakd.ask_about(model, image, question, max_new_tokens=max_new_tokens)


def demo(models: list[str], host: str = "127.0.0.1", port: int = 7860, max_upload: int = 10) -> None:
    """Serve a page on which up to three models answer the same question side by side."""
    llavakd.run_demo(models, host=host, port=port, max_upload=max_upload)


def _described(function: Callable[..., None]) -> Callable[..., None]:
    """A function whose parameters are options and arguments; assets/options.yaml says what they are for."""
    said, hints = OPTIONS["any"] | OPTIONS.get(function.__name__, {}), function.__annotations__
    for name, parameter in inspect.signature(function).parameters.items():
        settings = {"help": said[name]} if isinstance(said[name], str) else dict(said[name])
        kind = typer.Argument if parameter.default is parameter.empty or name in ARGUMENTS else typer.Option
        hints[name] = Annotated[hints[name], kind(*settings.pop("names", ()), **settings)]
    return function


for each in (quickstart, train, cache, plan, check, shapes, evaluate, report, convert, export, chat, demo):
    app.command("eval" if each is evaluate else None)(_described(each))


def _show(template: str, answer: dict[str, Any], as_json: bool = False) -> None:
    """One JSON object, or a Markdown template, drawn."""
    if as_json:
        typer.echo(json.dumps(answer))
    else:
        Console().print(Markdown(render(template, answer=answer)))


def main() -> None:
    """Entry point: the user's mistakes end with one message and exit code 1, an interrupted run with 130."""
    try:
        app()
    except UserError as error:
        say(f"error: {error}")
        sys.exit(1)
    except Interrupted as stop:
        say(str(stop))
        sys.exit(130)
    except SystemExit as end:  # typer turns Ctrl-C outside the training loop into exit code 130
        if end.code == 130:
            say("interrupted; the same command goes on from what is saved")
        raise
