"""Pictures of a source -> RGB -> pixel values through the tower's own processor, or its features, kept on disk."""

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
    """A picture of a folder, archive or table, or an opened one, upright, as RGB; DataError: missing, broken, a bomb."""
    if isinstance(name, Image.Image):
        return upright_rgb(name)
    place = (data.path if name.startswith("@") else data.images) or ""
    try:
        file: io.BytesIO | Path = Path(place) / name
        if name.startswith("@"):
            file = io.BytesIO(stored_picture(Path(place), name))
        elif place.endswith(_ARCHIVES):
            file = io.BytesIO(_archive(place, os.getpid())[0](name))
        with Image.open(file) as opened:
            return upright_rgb(opened)
    except Exception as error:  # a damaged picture or archive makes PIL and zipfile raise a dozen unrelated types
        raise DataError(f"cannot read picture {name!r} of {place}: {type(error).__name__}: {error}") from error


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Turned as its EXIF tag says; 16 bits a pixel are scaled to 8, where PIL alone would cut them off at 255."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 256).convert("L")
    return picture.convert("RGB")


def has_picture(data: DataConfig, name: str) -> bool:
    """Whether it is there, by its name alone; a folder is listed once, for asking it about each file is slow."""
    folder = data.images or ""
    place, inner = (folder, name) if folder.endswith(_ARCHIVES) else os.path.split(Path(folder) / name)
    return name.startswith("@") or inner in _names(place)


@lru_cache(maxsize=4)
def _archive(path: str, pid: int) -> tuple[Callable[[str], bytes], frozenset[str]]:
    """Reads a member, and all their names; one handle a process: forked workers must not share a file position."""
    if path.endswith(".zip"):
        archive = zipfile.ZipFile(path)
        return archive.read, frozenset(archive.namelist())
    tar = tarfile.open(path)
    members = {member.name.removeprefix("./"): member for member in tar.getmembers()}
    return lambda name: tar.extractfile(members[name]).read(), frozenset(members)  # type: ignore[union-attr]


@cache
def _names(place: str) -> frozenset[str]:
    """Names in a folder or archive; none where it is not there."""
    try:
        return _archive(place, os.getpid())[1] if place.endswith(_ARCHIVES) else frozenset(os.listdir(place))
    except (OSError, zipfile.BadZipFile, tarfile.TarError):
        return frozenset()
