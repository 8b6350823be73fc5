"""Pictures of a source -> RGB -> pixel values through the vision tower's own processor."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from llavakd.config import DataConfig
from llavakd.data.files import DataError, stored_picture

_ARCHIVES = (".zip", ".tar")


def load_pixels(data: DataConfig, names: Sequence[Any], image_processor: Any) -> Tensor:
    """Pictures of one source -> float32 [len(names), 3, H, W]."""
    return image_processor(images=[read_image(data, name) for name in names], return_tensors="pt").pixel_values


def read_image(data: DataConfig, name: Any) -> Image.Image:
    """The picture `name` of a folder, zip or tar archive, or table, upright and as RGB; or an opened picture, likewise.

    Raises:
        DataError: missing or unreadable picture, or one beyond PIL's limit against decompression bombs; named.
    """
    if isinstance(name, Image.Image):
        return upright_rgb(name)
    try:
        with Image.open(picture_file(data, name)) as opened:
            return upright_rgb(opened)
    except Exception as error:  # a damaged picture or archive makes PIL and zipfile raise a dozen unrelated types
        place = data.path if name.startswith("@") else data.images
        raise DataError(f"cannot read picture {name!r} of {place}: {type(error).__name__}: {error}") from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; 16 bits a pixel are scaled to 8, where PIL alone would cut them off at 255."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    return picture.convert("RGB")


def picture_file(data: DataConfig, name: str) -> io.BytesIO | Path:
    """Where the encoded picture is; inside an archive or table, its bytes."""
    if name.startswith("@"):
        return io.BytesIO(stored_picture(Path(data.path), name))
    folder = data.images or ""
    return io.BytesIO(_archive(folder, os.getpid())(name)) if folder.endswith(_ARCHIVES) else Path(folder) / name


def has_picture(data: DataConfig, name: str) -> bool:
    """Whether it is there, by its name alone; a folder is listed once, for asking it about each file is slow."""
    if name.startswith("@"):
        return True
    folder = data.images or ""
    if folder.endswith(_ARCHIVES):
        return name in _members(folder)
    path = Path(folder) / name
    return path.name in _members(str(path.parent))


@lru_cache(maxsize=4)
def _archive(path: str, pid: int) -> Callable[[str], bytes]:
    """Reads a member; one handle a process: forked workers must not share a file position."""
    if path.endswith(".zip"):
        return zipfile.ZipFile(path).read
    archive = tarfile.open(path)
    members = {member.name.removeprefix("./"): member for member in archive.getmembers()}
    return lambda name: archive.extractfile(members[name]).read()  # type: ignore[union-attr]


@cache
def _members(path: str) -> frozenset[str]:
    """Names in a folder or archive; none where it is not there."""
    try:
        if path.endswith(".zip"):
            return frozenset(zipfile.ZipFile(path).namelist())
        if path.endswith(".tar"):
            with tarfile.open(path) as archive:
                return frozenset(name.removeprefix("./") for name in archive.getnames())
        return frozenset(os.listdir(path))
    except (OSError, zipfile.BadZipFile, tarfile.TarError):
        return frozenset()
