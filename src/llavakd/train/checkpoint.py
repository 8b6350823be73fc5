"""Whole or absent: checkpoints written beside their place and renamed into it, with a manifest that proves them."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer

from llavakd.data.readers import LOST
from llavakd.errors import UserError
from llavakd.progress import say
from llavakd.train.placement import joined, like
from llavakd.train.zero import ZeroAdamW, gathered

_MANIFEST = "manifest.json"


def write_folder(folder: Path, fill: Callable[[Path], Any], *, flush: bool = True) -> Any:
    """Let `fill` write a fresh folder, rename it to `folder`, return what `fill` did; UserError where that cannot be written."""
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        done = fill(partial)
        for path in partial.rglob("*") if flush else ():
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        _flush(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors say so that a disk is full
        if LOST.search(str(error)):  # of a reader torch raises it wherever this process is
            raise
        raise UserError(f"cannot write {folder}: {error}; make room, or give another place, and begin again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one rename; several processes may do so at once."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    partial.write_text(text, encoding="utf-8")
    _flush(partial)
    partial.replace(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(source: str, *forms: str) -> list[str]:
    """Digests of a file, or of those in a folder, where no forms are given a model's; a hub name stands for itself."""
    path, forms = Path(source), forms or ("config.json", "*.safetensors", "*.bin")
    found = [path] if path.is_file() else [file for form in forms for file in path.glob(form)]
    return [file_digest(file) for file in sorted(found) if file.is_file()] or [source]


def save_checkpoint(folder: Path | None, *, module: nn.Module, optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Write FOLDER/step-N: what learns, the optimiser, `state` (with its `step`), a manifest; None only lends its shards."""
    learning, moments = recursively_apply(joined, (_learning(module), optimizer.state_dict()), keep=bool(folder))
    if not folder:
        return

    def fill(partial: Path) -> None:
        save_file(learning, str(partial / "learning.safetensors"))
        torch.save({"optimizer": moments, "rng": torch.get_rng_state()}, partial / "optimizer.pt")
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        digests = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
        (partial / _MANIFEST).write_text(json.dumps(digests), encoding="utf-8")

    write_folder(folder / f"step-{state['step']}", fill)


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose every file matches its manifest; torn ones are named and passed over."""
    for path in _newest_first(folder):
        with contextlib.suppress(OSError, ValueError):
            digests = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            if digests and all(file_digest(path / name) == digest for name, digest in digests.items()):
                return path
        say(f"checkpoint {path} is torn; using the one before it")
    return None


def load_checkpoint(path: Path, *, module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, strictly, and return its `state`; UserError where it is of another model."""
    stored, present = load_file(str(path / "learning.safetensors")), _learning(module)
    if names := sorted(stored.keys() ^ present.keys()):
        told = f"checkpoint {path} does not fit the model: {len(names)} tensors differ, first {names[0]!r}"
        raise UserError(f"{told}; use a new --out for another model")
    rest = torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for number, held in rest["optimizer"]["state"].items():
        held |= {name: like(value, weights[number]) for name, value in held.items() if value.dim()}
    optimizer.load_state_dict(rest["optimizer"])
    for name, weight in present.items():
        with gathered(weight):
            weight.data.copy_(like(stored[name], weight))
    if isinstance(optimizer, ZeroAdamW):
        optimizer.engine.optimizer.refresh_fp32_params()
    torch.set_rng_state(rest["rng"])
    return json.loads((path / "state.json").read_text(encoding="utf-8"))


def prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and what an interrupted write left."""
    for path in [*_newest_first(folder)[keep:], *folder.glob(".partial-*")]:
        shutil.rmtree(path)


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _learning(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
