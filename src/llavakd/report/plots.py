"""Loss curves as inline SVG, pictures and Gram matrices as base64 PNG."""

import base64
import io
import math
from bisect import bisect
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llavakd.report.results import Results
from llavakd.templates import render

VIRIDIS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])  # RGB, low to high
TICKS = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
MAX_PIXELS = 256


def loss_curves(results: Results) -> dict[str, str]:
    """SVG text by loss part, for each part that any run logged."""
    lines = [line for run in results.runs for logged in run.stages.values() for line in logged]
    panels = {}
    for part in ("loss", "ce", "response_kl", "visual_kl", "relation"):
        if values := [line[part] for line in lines if 0 < (line.get(part) or 0) < math.inf]:  # fit on a log axis
            ticks = TICKS[bisect(TICKS, min(values)) - 1 : bisect(TICKS, max(values)) + 1]
            panels[part] = render("curve.svg.jinja", results=results, part=part, ticks=ticks, log10=math.log10)
    return panels


def gram_pictures(grams: Sequence[NDArray[np.float32]]) -> tuple[list[str], tuple[float, float], str]:
    """Square matrices, each over its Frobenius norm, on one scale: a PNG data URI each, the scale's two ends and its URI."""
    scaled = [gram / max(float(np.linalg.norm(gram)), 1e-12) for gram in grams]
    low, high = np.percentile(np.concatenate([matrix.ravel() for matrix in scaled]), [1, 99])
    shades = [np.clip((matrix - low) / max(high - low, 1e-12), 0, 1) for matrix in scaled]
    uris = []
    for shade in (*shades, np.linspace(0, 1, 128)[None]):
        channels = [np.interp(shade, np.linspace(0, 1, len(VIRIDIS)), channel) for channel in VIRIDIS.T]
        uris.append(_png(Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8)), Image.Resampling.BOX))
    return uris[:-1], (float(low), float(high)), uris[-1]


def picture_uri(path: str) -> str | None:
    """A picture file as a PNG data URI, shrunk if it is large, or None if it cannot be read."""
    try:
        with Image.open(path) as opened:
            return _png(opened.convert("RGB"), Image.Resampling.BICUBIC)
    except OSError:
        return None


def _png(picture: Image.Image, resampling: Image.Resampling) -> str:
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS), resampling, reducing_gap=None)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
