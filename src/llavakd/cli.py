"""The command line: parse, call one function, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markdown import Markdown

from llavakd.config import DataConfig, EvaluationConfig, TeacherConfig, load_recipe
from llavakd.errors import UserError
from llavakd.progress import Interrupted, bar, say
from llavakd.templates import render

RecipeFile = Annotated[Path, typer.Argument(help="A recipe file.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.key=value, stages by name")]
RunFolder = Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
TemplateName = Annotated[
    Literal["pretrain", "vicuna_v1", "chatml"], typer.Option(help="Text form of the conversation.")
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Distil a large vision-language model into a small one: dpt, sft, dft.",
)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Where the runs and the report go.")] = Path("quickstart"),
) -> None:
    """Run the three stages and their equal-step control on the built-in miniature world, on the CPU, and report."""
    from llavakd.quickstart import run_quickstart

    results = run_quickstart(out)
    _show("results.md.jinja", **results)
    print(  # noqa: T201
        f"\nReport: {out / 'report.html'}\nStudent: {out / 'dpt-sft-dft' / 'dft' / 'model'}\n"
        "Next, with your own data: write it as LLaVA JSON, copy a file from recipes/, set student, teacher and data, and run\n"
        "  llava-kd train my.yaml --out runs/mine"
    )


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None, out: RunFolder = None) -> None:
    """Run or go on with the stages of RECIPE."""
    from llavakd.pipeline import run_pipeline

    loaded = load_recipe(recipe, overrides or [])
    folder = out or Path("runs") / loaded.name
    results = run_pipeline(loaded, folder)
    if results["rows"]:  # without `evaluation`, and on all processes but the first, there is nothing to show
        _show("results.md.jinja", **results)
    print(f"Done: {folder}" + (f", report in {folder / 'report.html'}" if results["rows"] else ""))  # noqa: T201


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, such as A100-80, H100, RTX-4090.")] = "A100-80",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 1,
    efficiency: Annotated[float, typer.Option(help="Share of the GPU's bf16 rate that is reached.")] = 0.4,
    rows: Annotated[int | None, typer.Option(help="Rows of a data file that is not there.")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="Text tokens of its mean row.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say what RECIPE would cost, without weights: parameters, tokens, FLOPs, memory and hours of every stage."""
    from llavakd.plan import plan_run

    loaded = load_recipe(recipe, overrides or [])
    plan = plan_run(loaded, gpu=gpu, gpus=gpus, efficiency=efficiency, rows=rows, text_tokens=text_tokens)
    if as_json:
        print(json.dumps(plan))  # noqa: T201
        return
    _show("plan.md.jinja", **plan)
    for line in plan["assumptions"]:
        say(f"assumed: {line}")
    for stage in plan["stages"]:
        if stage["advice"]:
            say(f"warning: stage {stage['name']} will not fit on {plan['gpu']}; change: {stage['advice']}")


@app.command()
def check(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe file, or else --data.")] = None,
    overrides: Overrides = None,
    data: Annotated[Path | None, typer.Option(help="A data file to check by itself.")] = None,
    images: Annotated[Path | None, typer.Option(help="Its picture folder, zip or tar.")] = None,
    fast: Annotated[bool, typer.Option(help="Pictures only have to be there, they are not decoded.")] = False,
    workers: Annotated[int | None, typer.Option(help="Processes; default one a core.")] = None,
    report: Annotated[Path | None, typer.Option(help="Where all findings go as JSON.")] = None,
    write_clean: Annotated[Path | None, typer.Option(help="Where the good rows of --data go, each once.")] = None,
    out: RunFolder = None,
    as_json: AsJson = False,
) -> None:
    """Look at every row before anything trains; exit 1 if some cannot be used."""
    from llavakd.preflight import check_data, check_recipe

    if (recipe is None) == (data is None) or (recipe and write_clean):
        raise UserError("give either a recipe or --data FILE; --write-clean goes with --data")
    if recipe is not None:
        loaded = load_recipe(recipe, overrides or [])
        found = check_recipe(loaded, out or Path("runs") / loaded.name, fast=fast, workers=workers)
    else:
        source = DataConfig(path=str(data), images=str(images) if images else None)
        name = Path(source.path).name
        found = {name: check_data(name, source, [], fast=fast, workers=workers, clean=write_clean)}
    text = json.dumps(found, ensure_ascii=False)
    if report is not None:
        report.write_text(text + "\n", encoding="utf-8")
    print(text) if as_json else _show("check.md.jinja", found=found)  # noqa: T201
    if any(source["unusable"] for source in found.values()):
        sys.exit(1)


@app.command()
def shapes(
    directory: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    scenes: Annotated[int, typer.Option(help="Train scenes.")] = 2000,
    seed: Annotated[int, typer.Option(help="Decides everything.")] = 0,
    test_questions: Annotated[int, typer.Option(help="Rows of test.json.")] = 1000,
    noise: Annotated[float, typer.Option(help="Share of training questions answered wrongly.")] = 0.0,
    workers: Annotated[int, typer.Option(help="Processes that draw.")] = 1,
) -> None:
    """Write the built-in miniature world as a LLaVA-format folder."""
    from llavakd.shapes import write_world

    numbers = {"scenes": scenes, "seed": seed, "test_questions": test_questions, "workers": workers}
    with bar("draw", scenes) as advance:
        summary = write_world(
            directory, noise=noise, progress=lambda done, total: advance(done * scenes // total), **numbers
        )
    print(f"{directory}: {summary.pictures} pictures, rows {summary.rows}")  # noqa: T201


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="A LLaVA folder in transformers form.")],
    data: Annotated[Path | None, typer.Option(help="LLaVA-format questions; the last gpt turn is the truth.")] = None,
    images: Annotated[Path | None, typer.Option(help="Picture folder or zip.")] = None,
    template: TemplateName = "vicuna_v1",
    metric: Annotated[
        Literal["exact_match", "vqa_accuracy", "option_letter", "yes_no"], typer.Option(help="Rule that scores --data.")
    ] = "exact_match",
    tasks: Annotated[
        str | None, typer.Option(help="Instead of --data: paper10, or lmms-eval tasks and columns of it, a,b,c.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder of more tasks, as lmms-eval's YAML.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions, of each task.")] = None,
    out: Annotated[Path, typer.Option(help="Where the predictions go.")] = Path("eval"),
    batch_size: Annotated[int, typer.Option(help="Questions answered at once.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 128,
    as_json: AsJson = False,
) -> None:
    """Answer and score a question file, or benchmarks through lmms-eval."""
    if (data is None) == (tasks is None):
        raise UserError("got both --data and --tasks, or neither; give a question file or names of benchmarks")
    source = TeacherConfig(path=model, dtype="float32")
    questions = DataConfig(path=str(data or ""), images=str(images) if images else None, template=template)
    evaluation = EvaluationConfig(data="data", metric=metric, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if tasks is None:
        from llavakd.pipeline import evaluate_folder

        row = evaluate_folder(source, questions, evaluation, out, limit=limit)
    else:
        try:
            from llavakd.evaluate.lmms import evaluate_tasks
        except ImportError as error:
            raise UserError(
                f"--tasks: {error}; run pip install 'llava-kd[eval]' and then pip install --no-deps lmms-eval==0.7.3"
            ) from error
        row = evaluate_tasks(
            source, tasks.replace(" ", "").split(","), questions, evaluation, out, include=include, limit=limit
        )
    if as_json:
        print(json.dumps(row))  # noqa: T201
    elif tasks is None:
        _show("results.md.jinja", rows=[row])
    else:
        _show("benchmarks.md.jinja", **row)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[Path | None, typer.Option(help="Where the report goes; default the first run.")] = None,
) -> None:
    """Write results.json, report.md and report.html from one or more runs."""
    from llavakd.report import write_report

    folder = out or runs[0]
    write_report(runs, folder)
    _show("results.md.jinja", **json.loads((folder / "results.json").read_text(encoding="utf-8")))
    print(f"Report: {folder / 'report.html'}")  # noqa: T201


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A TinyLLaVA, LLaVA-KD or LLaVA-1.5 checkpoint folder.")],
    target: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    tokenizer: Annotated[str | None, typer.Option(help="Where SOURCE has none; folder or hub name.")] = None,
    vision_tower: Annotated[str | None, typer.Option(help="Where its image processor (and tower) is.")] = None,
) -> None:
    """Write a checkpoint of another project as a transformers folder that computes the same."""
    from llavakd.models.tinyllava import convert as convert_checkpoint

    print(convert_checkpoint(source, target, tokenizer=tokenizer, vision_tower=vision_tower))  # noqa: T201


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, one of its stages, or a LLaVA folder.")],
    target: Annotated[Path, typer.Argument(help="A new or empty folder.")],
    dtype: Annotated[Literal["bf16", "fp16", "fp32"] | None, typer.Option(help="Default: as stored.")] = None,
    license: Annotated[str, typer.Option(help="For the model card, as the hub spells it.")] = "other",
    push: Annotated[str | None, typer.Option(help="OWNER/NAME on a hub, private where it is new.")] = None,
) -> None:
    """Write a trained model as a plain transformers folder with a model card, its logits compared before and after."""
    from huggingface_hub import HfApi

    from llavakd.export import export_model, push_folder

    print(export_model(model, target, dtype=dtype, license=license))  # noqa: T201
    if push:
        print(push_folder(target, push, HfApi()))  # noqa: T201


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run, one of its stages, or a LLaVA folder.")],
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str | None, typer.Argument(help="Without one, questions are read line by line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer in tokens.")] = 512,
) -> None:
    """Ask a model about a picture."""
    from llavakd.chat import ask_about

    ask_about(model, image, question, max_new_tokens=max_new_tokens)


@app.command()
def demo(
    models: Annotated[list[str], typer.Argument(help="Up to three runs, stages or LLaVA folders.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where the page is served.")] = 7860,
    max_upload: Annotated[int, typer.Option(min=1, help="Largest picture file in MiB.")] = 10,
) -> None:
    """Serve a page on which up to three models answer the same question side by side."""
    from llavakd.demo import run_demo

    run_demo(models, host=host, port=port, max_upload=max_upload)


def _show(template: str, **content: Any) -> None:
    """A Markdown template, drawn."""
    Console().print(Markdown(render(template, **content)))


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
            say("interrupted; the same command goes on from the last checkpoint")
        raise
