"""What the user did wrong, said so that they can mend it."""

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """What the user gave is wrong; the message says what was got, what was expected and what to change."""


class RecipeError(UserError):
    """The recipe is wrong; the message names the key and what to change."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a word that is not known: the closest known one, or all of them."""
    known = [name for name in known if name]
    if close := difflib.get_close_matches(word, known, n=1, cutoff=0.5):
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def optional(module: str, use: str, extra: str) -> Any:
    """The module that only some uses need; UserError where it is not there, with the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{use} needs {module} ({error}); install it: pip install 'llava-kd[{extra}]'") from error
