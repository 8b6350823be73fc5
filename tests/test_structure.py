"""The shape of the source: small files, short functions, imports in one direction, recipes that load anywhere."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from llavakd.config import load_recipe

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "llavakd"
FILES = sorted(SOURCE.rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))

MAY_NOT_IMPORT = {
    "config": ("data", "losses", "models", "train", "evaluate", "report", "shapes", "pipeline", "cli", "progress"),
    "losses": ("data", "models", "train", "evaluate", "report", "shapes", "pipeline", "cli", "progress"),
    "data": ("models", "train", "evaluate", "report", "pipeline", "cli"),
    "models": ("train", "pipeline", "cli", "report", "evaluate"),
    "train": ("pipeline", "cli", "report", "evaluate"),
    "evaluate": ("train", "pipeline", "cli", "report"),
    "report": ("models", "train", "pipeline", "cli"),
    "shapes": ("models", "train", "evaluate", "report", "pipeline", "cli"),
    "pipeline": ("cli",),
    "plan": ("cli", "pipeline", "evaluate", "report"),
    "export": ("cli", "pipeline", "evaluate", "report", "chat", "demo"),
    "chat": ("cli", "pipeline", "evaluate", "report", "train", "demo"),
    "demo": ("cli", "pipeline", "evaluate", "report", "train"),
}


def room_of(path: Path) -> str:
    """config, losses, data, ...: the package or module right below llavakd."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of llavakd in a file, those inside functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, name.split(".")[1]) for name in names if name.startswith("llavakd."))


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_the_files_to_check_are_found():
    assert len(FILES) > 30
    assert len(RECIPES) >= 3
    assert {"losses", "data"} <= {room for _, room in imports_of(SOURCE / "train" / "step.py")}


def test_no_file_is_longer_than_400_lines():
    assert {str(path): n for path in FILES if (n := lines_of(path)) > 400} == {}


def test_the_source_is_no_longer_than_6000_lines():
    assert sum(map(lines_of, FILES)) <= 6000


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which says as much as a public contract needs."""
    docstring = function.body[0].end_lineno - function.body[0].lineno + 1 if ast.get_docstring(function) else 0
    return function.end_lineno - function.lineno + 1 - docstring


def test_no_function_is_longer_than_60_lines():
    long = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": length
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (length := code_lines(node)) > 60
    }
    assert long == {}


@pytest.mark.parametrize("room", MAY_NOT_IMPORT)
def test_imports_point_one_way(room):
    files = [path for path in FILES if room_of(path) == room]
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {other}"
        for path in files
        for line, other in imports_of(path)
        if other in MAY_NOT_IMPORT[room]
    ]
    assert wrong == []


def test_only_main_imports_the_command_line():
    importers = {path.name for path in FILES for _, room in imports_of(path) if room == "cli"}
    assert importers == {"__main__.py"}


def strings_of(tree) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from strings_of(value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_loads_and_names_no_absolute_path(path):
    assert load_recipe(path).stages
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert [text for text in strings_of(tree) if text.startswith(("/", "~", "C:"))] == []
