"""Write docs/config.md: every key of a recipe, from the dataclasses of llavakd.config and docs/config_notes.yaml.

    python docs/make_config.py

A field's own docstring comes first, then its note. A key with neither, or a note without its key, is an error.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal

import annotated_types
import yaml
from pydantic.fields import FieldInfo

from llavakd import config
from llavakd.data.chat import TEMPLATES, Template
from llavakd.evaluate.scoring import METRICS
from llavakd.losses.divergence import DIVERGENCES
from llavakd.models.parts import FAMILIES, IMAGE_PROCESSORS, PROJECTORS, TOWERS
from llavakd.plan import GPUS

DOCS = Path(__file__).parent
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
TITLES = {
    "": "The recipe",
    "student": "student",
    "teacher": "teacher",
    "data.NAME": "data",
    "data.NAME.subset": "data: subset",
    "stages.NAME": "stages",
    "stages.NAME.losses": "stages: losses",
    "evaluation": "evaluation",
    "world": "world",
}
INTRODUCTION = """\
# Every key of a recipe

Made from the source by `python docs/make_config.py`; do not edit. NAME stands for a name of yours. On the command line every key
can be overridden by its dotted name, a stage's through the stage's name: `stages.dft.losses.relation=1.0`.
"""


def field_docstrings() -> dict[str, dict[str, str]]:
    """The string literal below each field, by class and field."""
    found: dict[str, dict[str, str]] = {}
    for owner in ast.parse(inspect.getsource(config)).body:
        if isinstance(owner, ast.ClassDef):
            fields = found.setdefault(owner.name, {})
            for field, below in zip(owner.body, owner.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                    text = ast.literal_eval(below.value)
                    fields[typing.cast(ast.Name, field.target).id] = inspect.cleandoc(text).replace("\n", " ")
    return found


def describe(hint: Any) -> str:
    """A type in words, with its bounds."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        bounds = ", ".join(filter(None, map(describe_bound, _constraints(given[1:]))))
        return f"{describe(given[0])}, {bounds}" if bounds else describe(given[0])
    if origin is Literal:
        *others, last = (f"`{choice}`" for choice in given)
        return f"{', '.join(others)} or {last}" if others else last
    if origin in (typing.Union, UnionType):
        return ", or ".join("nothing" if part is NoneType else describe(part) for part in given)
    if origin is tuple and given[-1] is not Ellipsis:
        return f"{len(given)} {describe(given[0])}s"
    if origin in (tuple, dict):
        inner = given[1] if origin is dict else given[0]
        words = "sections" if dataclasses.is_dataclass(inner) else describe(inner)
        return f"{'list of' if origin is tuple else 'mapping of names to'} {words}"
    return "section" if dataclasses.is_dataclass(hint) else WORDS[hint]


def describe_bound(bound: Any) -> str:
    """One constraint of pydantic's in words."""
    match bound:
        case annotated_types.Ge(low):
            return f"at least {low}"
        case annotated_types.Gt(low):
            return f"above {low}"
        case annotated_types.Le(high):
            return f"at most {high}"
        case annotated_types.Lt(high):
            return f"below {high}"
        case annotated_types.MinLen(length):
            return f"{length} or more of them"
    if pattern := getattr(bound, "pattern", None):
        return f"of the form `{pattern}`"
    assert "allow_inf_nan=False" in repr(bound), f"no words for {bound!r}"
    return "finite"


def _constraints(given: tuple[Any, ...]) -> Iterator[Any]:
    for one in given:
        assert isinstance(one, FieldInfo)
        yield from one.metadata


def default_of(field: dataclasses.Field[Any]) -> str:
    """As YAML writes it."""
    if field.default is dataclasses.MISSING:
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return "nothing" if value is None else f"`{yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}`"


def sections(owner: Any = config.Recipe, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted prefix, dataclass) of a class and of all that its fields hold, in order."""
    yield prefix, owner
    for name, hint in typing.get_type_hints(owner).items():
        inner = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        for part in inner:
            several = typing.get_origin(hint) in (dict, tuple)
            yield from sections(part, ".".join(filter(None, [prefix, name, "NAME" * several])))


def key_tables() -> Iterator[str]:
    """A table of keys for every dataclass."""
    docstrings, notes = field_docstrings(), yaml.safe_load((DOCS / "config_notes.yaml").read_text(encoding="utf-8"))
    for prefix, owner in sections():
        yield f"\n## {TITLES[prefix]}\n\n{inspect.getdoc(owner)}\n\n| key | value | |\n|---|---|---|\n"
        hints = typing.get_type_hints(owner, include_extras=True)
        for field in dataclasses.fields(owner):
            key = f"{prefix}.{field.name}".lstrip(".")
            said = [docstrings[owner.__name__].get(field.name), notes.pop(key, None)]
            text = " ".join(part.rstrip(".") + "." for part in said if part)
            assert text, f"{key} has no docstring; write one, or a note in config_notes.yaml"
            default = default_of(field)
            value = f"{describe(hints[field.name])}; {default if default == 'required' else 'default ' + default}"
            yield f"| `{key}` | {value} | {text} |\n"
    assert not notes, f"config_notes.yaml: no such keys: {', '.join(notes)}"


def lay_out(template: Template) -> str:
    """A question about a picture and its answer as this template writes them."""
    question = template.question.format(pictures=template.picture, text="QUESTION")
    end = "END-OF-SEQUENCE" if template.end is None else template.end
    lines = {
        "given": template.system + question,
        "answer": template.answer.format(text="ANSWER") + end,
        "then": template.after_answer,
    }
    return "\n".join(f"{label:7}{text!r}" for label, text in lines.items() if text)


def enumerations() -> Iterator[str]:
    """What the keys with choices choose from."""
    yield "\n## Templates\n\nHow a row with one picture becomes text (`data/templates.yaml`). The line `answer` is supervised.\n"
    for name, template in TEMPLATES.items():
        yield f"\n`{name}`\n\n```text\n{lay_out(template)}\n```\n"
    yield "\n## Projectors\n\n"
    layers = {"gelu": "two layers with a GELU between them", "linear": "one layer (the second stays at the identity)"}
    for name, activation in PROJECTORS.items():
        yield f"- `{name}`: {layers[activation]}; the student is a stock Llava.\n"
    (other,) = set(typing.get_args(typing.get_type_hints(config.StudentConfig)["projector"])) - PROJECTORS.keys()
    yield f"- `{other}`: one visual token of 2 x 2 patches; the student is a stock Aya Vision.\n"
    yield "\n## Vision towers\n\n"
    yield f"Kinds of tower: {_names(TOWERS)}. Of image processor: {_names(IMAGE_PROCESSORS)}. Of whole folder, which may stand "
    yield f"for a part too: {_names(FAMILIES)}.\n"
    yield "\n## Divergences\n\nFormulas and gradients: [Losses](losses.md#the-five-divergences).\n\n"
    for name, kind in DIVERGENCES.items():
        yield f"- `{name}`: {inspect.getdoc(kind)}\n"
    yield "\n## Metrics\n\n"
    for name, metric in METRICS.items():
        yield f"- `{name}`: {inspect.getdoc(metric)}\n"
    yield "\n## GPUs that `plan` knows\n\n| `--gpu` | bf16 TFLOP/s | GiB |\n|---|--:|--:|\n"
    for name, (rate, gib) in GPUS.items():
        yield f"| `{name}` | {rate:,} | {gib} |\n"


def _names(table: typing.Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in table)


def page() -> str:
    """The whole page."""
    return INTRODUCTION + "".join(key_tables()) + "".join(enumerations())


if __name__ == "__main__":
    (DOCS / "config.md").write_text(page(), encoding="utf-8")
