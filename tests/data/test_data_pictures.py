"""Reading pictures: every kind becomes upright RGB, and what cannot be read is named."""

from __future__ import annotations

import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image
from transformers import SiglipImageProcessorPil

from llavakd.config import DataConfig
from llavakd.data.files import DataError
from llavakd.data.pictures import has_picture, load_pixels, read_image


def among(images) -> DataConfig:
    return DataConfig(path="rows.json", images=str(images))


ORANGE = (250, 120, 10)


def picture(mode: str) -> Image.Image:
    rgb = Image.new("RGB", (6, 4), ORANGE)
    return rgb.quantize(4) if mode == "P" else rgb.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "1"])
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode):
    picture(mode).save(tmp_path / "x.png")
    got = read_image(among(tmp_path), "x.png")
    assert (got.mode, got.size) == ("RGB", (6, 4))
    pixel = got.getpixel((0, 0))
    if mode in ("L", "LA", "1"):
        assert len(set(pixel)) == 1, "gray stays gray"
    else:
        assert np.abs(np.subtract(pixel, ORANGE)).max() <= 2


def test_pictures_come_out_of_a_zip_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for name, colour in (("a/red.png", (255, 0, 0)), ("blue.png", (0, 0, 255))):
            data = io.BytesIO()
            Image.new("RGB", (3, 3), colour).save(data, "PNG")
            archive.writestr(name, data.getvalue())
    images = str(tmp_path / "pictures.zip")
    assert read_image(among(images), "a/red.png").getpixel((1, 1)) == (255, 0, 0)
    assert read_image(among(images), "blue.png").getpixel((1, 1)) == (0, 0, 255)
    with pytest.raises(DataError, match=r"'green\.png'.*pictures\.zip"):
        read_image(among(images), "green.png")


def png(change) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    return bytes(change(bytearray(data.getvalue())))


def broken_chunk(data: bytearray) -> bytearray:
    """Two IDAT chunks, the second with a name that is no name; PIL answers with SyntaxError."""
    start = data.index(b"IDAT") - 4
    return data[:start] + b"\x00\x00\x00\x04\xfcjF\xec" + data[start:]


def huge(_: bytearray) -> bytearray:
    """A bitmap that claims 60,000 x 60,000 pixels; PIL answers with DecompressionBombError."""
    data = io.BytesIO()
    Image.new("RGB", (2, 2)).save(data, "BMP")
    raw = bytearray(data.getvalue())
    raw[18:26] = (60_000).to_bytes(4, "little") * 2
    return raw


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:200], lambda data: b"", lambda data: b"no picture", broken_chunk, huge],
    ids=["torn", "empty", "text", "broken chunk", "huge"],
)
def test_a_damaged_picture_is_named(tmp_path, change):
    (tmp_path / "bad.png").write_bytes(png(change))
    with pytest.raises(DataError, match=r"cannot read picture 'bad\.png' of ") as caught:
        read_image(among(tmp_path), "bad.png")
    assert str(tmp_path) in str(caught.value)


def test_a_damaged_archive_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.png", b"x" * 500 + bytes(range(256)))
    raw = bytearray((tmp_path / "bad.zip").read_bytes())
    raw[35:45] = b"\xff" * 10
    (tmp_path / "bad.zip").write_bytes(raw)
    with pytest.raises(DataError, match=r"'x\.png' of .*bad\.zip"):
        read_image(among(tmp_path / "bad.zip"), "x.png")


def test_a_missing_picture_or_archive_is_named(tmp_path):
    for images in (tmp_path, tmp_path / "none.zip"):
        with pytest.raises(DataError, match=r"'x\.png'.*No such file"):
            read_image(among(images), "x.png")


def test_pictures_come_out_of_a_tar_archive_by_whole_names(tmp_path):
    with tarfile.open(tmp_path / "pictures.tar", "w") as archive:
        for name, colour in (("./a/red.png", (255, 0, 0)), ("blue.png", (0, 0, 255))):
            data = io.BytesIO()
            Image.new("RGB", (3, 3), colour).save(data, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            archive.addfile(member, io.BytesIO(data.getvalue()))
    images = among(tmp_path / "pictures.tar")
    assert read_image(images, "a/red.png").getpixel((1, 1)) == (255, 0, 0)
    assert [has_picture(images, name) for name in ("a/red.png", "blue.png", "red.png")] == [True, True, False]
    with pytest.raises(DataError, match=r"'red\.png' of .*pictures\.tar"):
        read_image(images, "red.png")


def test_a_picture_is_there_or_not_by_its_name(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "deep" / "x.png")
    found = [has_picture(among(tmp_path), name) for name in ("deep/x.png", "deep/X.png", "x.png", "other/x.png")]
    assert found == [True, False, False, False]
    assert not has_picture(among(tmp_path / "none.zip"), "x.png")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_exif_tag_says(tmp_path, orientation):
    """TIFF 6.0, tag 274: which corner of the scene the first stored row and column start at."""
    scene = np.zeros((2, 3, 3), np.uint8)
    scene[0, 0] = (255, 0, 0)
    scene[0, 2] = (0, 255, 0)
    stored = {
        1: scene,
        2: scene[:, ::-1],
        3: scene[::-1, ::-1],
        4: scene[::-1],
        5: scene.transpose(1, 0, 2),
        6: scene.transpose(1, 0, 2)[::-1],
        7: scene.transpose(1, 0, 2)[::-1, ::-1],
        8: scene.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(among(tmp_path), "x.png")), scene)


def test_sixteen_bits_are_scaled_to_eight(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(read_image(among(tmp_path), "x.png"))[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_a_cmyk_picture_becomes_rgb(tmp_path):
    Image.new("CMYK", (5, 5), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    assert np.abs(np.subtract(read_image(among(tmp_path), "x.jpg").getpixel((2, 2)), (255, 0, 0))).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (900, 1), (3, 3)])
def test_a_picture_of_any_shape_goes_through_the_processor(tmp_path, size):
    Image.new("RGB", size, (255, 0, 128)).save(tmp_path / "x.png")
    processor = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    pixels = load_pixels(among(tmp_path), ["x.png"], processor)
    assert pixels.shape == (1, 3, 8, 8)
    assert pixels.mean((2, 3))[0].tolist() == pytest.approx([1, -1, 128 / 127.5 - 1], abs=1e-2)


def test_an_opened_picture_stands_for_itself():
    got = read_image(among("nowhere"), picture("P"))
    assert (got.mode, got.size) == ("RGB", (6, 4))
