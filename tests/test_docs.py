"""The pages say what is so: keys, figures, links, commands, messages, names in the source, and the map of folders."""

from __future__ import annotations

import ast
import dataclasses
import itertools
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import make_config
import make_tables
import pytest
import typer.main
import yaml

from llavakd.cli import app
from llavakd.config import load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
DOCS, SOURCE = ROOT / "docs", ROOT / "src" / "llavakd"
PAGES = sorted(DOCS.glob("*.md"))
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
COMMANDS = typer.main.get_command(app).commands
OTHERS = {"--model_args", "--mmproj"}  # options of other programs: lmms-eval, llama.cpp
ANY_RECIPE = ROOT / "recipes" / "shapes" / "smoke.yaml"  # in the place of my.yaml

each_page = pytest.mark.parametrize("page", READ, ids=lambda page: page.name)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """Inline code."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [two or one for two, one in re.findall(r"``(.+?)``|`([^`]+)`", prose)]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def test_the_page_of_keys_is_made_from_the_source_as_it_is():
    assert text_of(DOCS / "config.md") == make_config.page(), "run: python docs/make_config.py"


def keys_of(tree: dict, prefix: str = "") -> Iterator[str]:
    """Dotted names of a whole recipe's keys, what is named by the user as NAME."""
    for key, value in tree.items():
        yield prefix + key
        if prefix + key == "stages":
            yield from keys_of(value[0], "stages.NAME.")
        elif prefix + key == "data":
            yield from keys_of(next(iter(value.values())), "data.NAME.")
        elif isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def test_every_key_of_a_whole_recipe_has_its_row():
    subset = "data.pretrain.subset={group: x, start: 0.0, stop: 1.0}"
    whole = dataclasses.asdict(load_recipe(ANY_RECIPE, [subset]))
    table = text_of(DOCS / "config.md").partition("## Templates")[0]
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", table, re.MULTILINE)) == sorted(keys_of(whole))


@pytest.mark.parametrize("page", make_tables.PAGES, ids=lambda page: page.name)
def test_the_figures_are_those_of_the_results(page):
    assert text_of(page) == make_tables.filled(text_of(page)), "run: python docs/make_tables.py"


def test_every_table_of_figures_stands_somewhere():
    assert {name for page in make_tables.PAGES for _, name, _ in make_tables.PLACE.findall(text_of(page))} == set(
        make_tables.TABLES
    )


def test_the_readmes_figures_are_the_quickstarts():
    told = json.loads(text_of(ROOT / "benchmarks" / "results" / "quickstart.json"))
    minutes, seconds = divmod(told["command_seconds"], 60)
    right = {row["name"]: f"{100 * row['accuracy']:.1f}" for row in told["rows"]}
    readme = text_of(ROOT / "README.md").replace("\n", " ")
    assert f"{minutes} min {seconds} s" in readme
    assert f"{right['pt-sft-sft']} and {right['dpt-sft-dft']} %" in readme


@each_page
def test_links_lead_to_files_and_headings_that_are_there(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", without_code(text_of(page)))
    for target in map("".join, targets):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), (
            f"{page.name} links to {target}; headings: {sorted(anchors(file))}"
        )


def test_the_navigation_has_every_page_once():
    settings = yaml.safe_load(text_of(ROOT / "mkdocs.yml"))
    named = [page for entry in settings["nav"] for page in entry.values()]
    assert sorted(named) == [page.name for page in PAGES]


def test_the_map_of_folders_is_the_tree():
    table = text_of(ROOT / "README.md").partition("## Where things live")[2]
    named = [
        path for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for path in re.findall(r"`([^`]+)`", row)
    ]
    assert [path for path in named if not (ROOT / path).exists()] == []
    folders = {f"src/llavakd/{path.parent.name}/" for path in SOURCE.glob("*/*") if path.parent.name != "__pycache__"}
    assert folders <= set(named)


def command_lines(text: str) -> Iterator[list[str]]:
    """Words after `llava-kd` (or `-m llavakd`) of every command in a block of shell."""
    for line in "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines():
        for words in re.split(r"&&|;", line.partition(" # ")[0]):
            if found := re.search(r"(?:^|\s)(?:llava-kd|-m llavakd) (.*)", words):
                yield shlex.split(found[1])


def test_commands_are_found():
    assert len([words for page in READ for words in command_lines(text_of(page))]) > 30


@each_page
def test_commands_parse_and_their_overrides_are_keys(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for verb, *words in command_lines(text_of(page)):
        given = COMMANDS[verb].make_context(verb, list(words)).params
        if given.get("recipe"):
            recipe = given["recipe"] if given["recipe"].exists() else ANY_RECIPE
            load_recipe(recipe, given["overrides"] or [])


@each_page
def test_commands_and_options_in_a_sentence_are_there(page):
    options = {verb: {name for one in command.params for name in one.opts} for verb, command in COMMANDS.items()}
    known = set().union(*options.values(), ["--help"], OTHERS)
    for span in spans(text_of(page)):
        if found := re.match(r"llava-kd ([a-z]\S*)(.*)", span):
            assert found[1] in options, span
            assert set(re.findall(r"--[a-z_-]+", found[2])) <= {*options[found[1]], "--help"}, span
        elif span.startswith("--"):
            assert re.match(r"--[a-z_-]+", span)[0] in known, span


def texts(node: ast.AST | None) -> list[str]:
    """What a piece of code may write, NUL where anything may stand."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr(values=parts):
            return ["".join(choice) for choice in itertools.product(*map(texts, parts))]
        case ast.FormattedValue(value=(ast.IfExp() | ast.Constant()) as value):
            return texts(value)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return [one + other for one in texts(left) for other in texts(right)]
        case ast.IfExp(body=body, orelse=orelse):
            return texts(body) + texts(orelse)
    return ["\0"]


@pytest.fixture(scope="module")
def messages() -> list[re.Pattern[str]]:
    """Every line that the source can write and that has enough words of its own."""
    written: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(text_of(path))))
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
        written |= {
            text for node in nodes if isinstance(node, kinds) and node not in docstrings for text in texts(node)
        }
    for path in SOURCE.rglob("*.jinja"):
        written.add(re.sub(r"{%.*?%}", "\n", re.sub(r"{{.*?}}", "\0", text_of(path))))
    lines = {line.strip() for text in written for line in text.split("\n") if len(line.replace("\0", "").strip()) >= 12}
    return [re.compile(".*".join(map(re.escape, line.split("\0")))) for line in lines]


def quoted(page: Path) -> list[str]:
    return [two or one for two, one in re.findall(r"^> (?:``(.+?)``|`(.+?)`)$", text_of(page), re.MULTILINE)]


def test_messages_are_quoted():
    assert len(quoted(DOCS / "faq.md")) > 15


@each_page
def test_quoted_messages_are_what_the_source_writes(page, messages):
    for message in quoted(page):
        said = message.removeprefix("error: ")
        assert any(pattern.fullmatch(said) for pattern in messages), f"nothing in src writes {said!r}"


def test_an_invented_message_would_be_noticed(messages):
    assert not any(pattern.fullmatch("tokenizers differ: use another student") for pattern in messages)


@each_page
def test_places_in_the_source_are_there(page):
    for path, name in (found for span in spans(text_of(page)) for found in re.findall(r"^([\w/]+\.py):(\w+)$", span)):
        file = SOURCE / path
        assert file.is_file(), f"{page.name} names {path}"
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", text_of(file), re.MULTILINE), f"{path}:{name}"


@each_page
def test_named_files_of_the_repository_are_there(page):
    for span in spans(text_of(page)):
        if re.fullmatch(r"(?:recipes|tests|benchmarks|docs|src)/[\w./-]+", span):
            assert (ROOT / span).exists(), f"{page.name} names {span}"


def test_the_recipe_shown_is_one():
    shown = [yaml.safe_load(block) for block in blocks(text_of(DOCS / "recipes.md"), "yaml")]
    assert [parse_recipe(tree).stages[-1].name for tree in shown] == ["dft"]


def test_the_site_builds_without_a_warning(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    settings = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    build(settings)
    pages = "".join(text_of(path) for path in (tmp_path / "site").glob("*.html"))
    assert "<math" in pages
    assert "arithmatex" not in pages
    assert not re.search(r'(?:src|<link [^>]*href)="https?://', pages)  # nothing is fetched by who reads it
