"""A tiny world, tiny random models, recipes for them, and a command line that starts in no time."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

if not torch.cuda.is_available():  # kernels run in Triton's interpreter, which must be chosen before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)  # threads that wait for each other on a busy machine take minutes over tiny models
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # no test asks a hub; read when first imported

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "shapes"))  # where make_parts.py is

ALL_LOSSES = {"ce": 1.0, "response_kl": 1.0, "visual_kl": 1.0, "relation": 0.5}


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Folders of the tiny world and of its model parts.

    `tower` (16 tokens, width 32) and `language_model` (width 32) hold configs without weights; `teacher` is a whole
    LLaVA folder of random weights, width 48; `mixed` is a data file of rows with no, one and two pictures.
    """

    root: Path
    world: Path
    tower: Path
    language_model: Path
    teacher: Path
    mixed: Path

    def tree(self) -> dict[str, Any]:
        """A three-stage recipe as plain dicts: dpt, sft, dft with the teacher's tower, fp32, saved every two steps."""
        images = str(self.world / "images")
        dpt = {"name": "dpt", "data": "pretrain", "train": ["projector"], "losses": dict(ALL_LOSSES)}
        both = ["projector", "language_model"]
        sft = {"name": "sft", "data": "instruct", "train": both, "losses": {"ce": 1.0}}
        dft = {"name": "dft", "data": "instruct", "train": both, "losses": dict(ALL_LOSSES)}
        for stage in (dpt, sft, dft):
            stage |= {"learning_rate": 1.0e-3, "global_batch_size": 8, "epochs": 0.75}
        sources = {
            "pretrain": {"path": str(self.world / "pretrain.json"), "images": images, "template": "pretrain"},
            "instruct": {"path": str(self.world / "instruct.json"), "images": images, "template": "chatml"},
            "mixed": {"path": str(self.mixed), "images": images, "template": "chatml"},
            "test": {"path": str(self.world / "test.json"), "images": images, "template": "chatml"},
        }
        return copy.deepcopy(
            {
                "name": "tiny",
                "student": {
                    "vision_tower": str(self.teacher),
                    "language_model": str(self.language_model),
                    "vision_feature_layer": -2,
                    "vision_feature_select_strategy": "full",
                    "from_scratch": ["language_model"],
                },
                "teacher": {"path": str(self.teacher), "dtype": "float32"},
                "data": {name: source | {"max_length": 400} for name, source in sources.items()},
                "stages": [dpt, sft, dft],
                "precision": "fp32",
                "save_every": 2,
                "log_every": 1,
                "workers": 0,
                "trackers": [],
            }
        )

    def recipe(self, path: Path, tree: dict[str, Any] | None = None) -> Path:
        """Write a recipe (by default the three stages) and return its path."""
        path.write_text(yaml.safe_dump(tree or self.tree(), sort_keys=False), encoding="utf-8")
        return path


def _shrink(folder: Path, name: str, changes: dict[str, Any]) -> Path:
    """A copy FOLDER/tiny-NAME of a part with other sizes."""
    target = folder / f"tiny-{name}"
    shutil.copytree(folder / name, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("layer_types", None)
    (target / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return target


def _write_mixed(world: Path, path: Path) -> Path:
    """32 rows: 16 with one picture, 6 with two, 10 with none; lengths are ragged."""
    rows = {name: json.loads((world / f"{name}.json").read_text(encoding="utf-8")) for name in ("instruct", "text")}
    pictured = [row for row in rows["instruct"] if row.get("image")]
    mixed = pictured[:16] + rows["text"][:10]
    for first, second in zip(pictured[16:22], pictured[22:28], strict=True):
        turns = copy.deepcopy(first["conversations"])
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        images = [second["image"], first["image"]]
        mixed.append({"id": f"two-{first['id']}", "image": images, "conversations": turns})
    path.write_text(json.dumps(mixed), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The tiny world and its parts; nobody may change them."""
    from make_parts import write_parts

    from llavakd.config import StudentConfig, WorldConfig
    from llavakd.models.student import build_student, save_model
    from llavakd.shapes.world import write_world

    root = tmp_path_factory.mktemp("tiny")
    write_world(root / "world", WorldConfig(scenes=48, seed=3, test_questions=12))
    parts = root / "parts"
    write_parts(parts)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2}
    tower = _shrink(
        parts, "tower", small | {"hidden_size": 32, "intermediate_size": 64, "image_size": 32, "patch_size": 8}
    )
    processor = json.loads((tower / "preprocessor_config.json").read_text(encoding="utf-8"))
    processor["size"] = {"height": 32, "width": 32}
    (tower / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
    # Heads padded beyond the tokenizer, and a wide start: random models must say different things about pictures.
    small |= {"num_key_value_heads": 2, "vocab_size": 704, "initializer_range": 0.2}
    student_lm = _shrink(parts, "student-lm", small | {"hidden_size": 32, "intermediate_size": 64})
    teacher_lm = _shrink(parts, "teacher-lm", small | {"hidden_size": 48, "intermediate_size": 96})
    teacher = build_student(
        StudentConfig(
            vision_tower=str(tower),
            language_model=str(teacher_lm),
            vision_feature_select_strategy="full",
            from_scratch=("vision_tower", "language_model"),
        ),
        seed=7,
    )
    save_model(teacher, root / "teacher", template="chatml")
    return Tiny(
        root=root,
        world=root / "world",
        tower=tower,
        language_model=student_lm,
        teacher=root / "teacher",
        mixed=_write_mixed(root / "world", root / "mixed.json"),
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """How a command ended; `code` is negative where a signal killed it."""

    code: int
    out: str
    err: str


class Command:
    """`llava-kd` as a process of its own with real exit codes and signals, forked from one that has it imported."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._calls, self._running = folder, 0, None
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "invariant" / "command_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    def start(self, *argv: object) -> int:
        """Start one command and return its process id, which is its process group's too; one runs at a time."""
        if self._running:  # left behind by a test that failed
            os.kill(self._running, signal.SIGKILL)
            self.finish()
        self._calls += 1
        request = {"argv": [str(word) for word in argv], "out": str(self._path("out")), "err": str(self._path("err"))}
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        self._path("out").touch()
        self._path("err").touch()
        self._running = int(self._server.stdout.readline())
        return self._running

    def finish(self) -> Finished:
        """Wait for the command that was started."""
        code, self._running = int(self._server.stdout.readline()), None
        return Finished(code=code, out=self._path("out").read_text(), err=self._path("err").read_text())

    def __call__(self, *argv: object) -> Finished:
        """Run one command to its end."""
        self.start(*argv)
        return self.finish()

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def _path(self, kind: str) -> Path:
        return self._folder / f"{self._calls}.{kind}"


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """The command line."""
    command = Command(tmp_path_factory.mktemp("commands"))
    yield command
    command.close()
