"""One reader of pictures: upright, no level lost, nothing hidden, nothing huge."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from dit_accel.batch.jobs import Job
from dit_accel.generation.options import What
from dit_accel.media.pictures import read_picture


def pixels(path):
    picture = read_picture(path)
    assert picture.mode == "RGB" and picture.filename == str(path)
    return np.asarray(picture)


def test_a_photo_stands_upright(tmp_path):
    photo = np.zeros((32, 64, 3), np.uint8)
    photo[:, :32] = 255  # the left half is white; turned by 90 degrees it is the upper half
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo).save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = pixels(tmp_path / "a.jpg")
    assert upright.shape == (64, 32, 3)
    assert upright[:28].min() > 200 and upright[36:].max() < 60


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bits_keep_their_ramp(tmp_path, kind):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None].repeat(8, 0)
    path = tmp_path / f"ramp.{kind}"
    Image.fromarray(ramp).save(path)
    assert np.array_equal(pixels(path)[0, :, 0], np.arange(256))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path, mode):
    hidden = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    if mode == "P":
        hidden = Image.new("P", (16, 16), 3)
        hidden.putpalette([200, 0, 0] * 256)
        hidden.info["transparency"] = 3
    hidden = hidden if mode == "P" else hidden.convert(mode)
    path = tmp_path / "a.png"
    hidden.save(path)
    assert pixels(path).min() == 255


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "CMYK"])
def test_other_modes(tmp_path, mode):
    Image.new("RGB", (16, 16), (250, 250, 250)).convert(mode).save(tmp_path / "a.tiff")
    assert pixels(tmp_path / "a.tiff").min() > 230


def bomb(side: int) -> bytes:
    """A small PNG file of side × side black pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        head = len(data).to_bytes(4, "big") + kind + data
        return head + zlib.crc32(kind + data).to_bytes(4, "big")

    size = side.to_bytes(4, "big") * 2
    out = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    out.seek(0, io.SEEK_END)
    out.write(chunk(b"IHDR", size + b"\x01\x00\x00\x00\x00"))
    out.write(chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("bomb.png", bomb(40_000), "too many pixels: at most 100,000,000"),
        ("large.png", bomb(12_000), "has 12000 × 12000 pixels: at most"),
        ("short.png", bomb(64)[:45], "cannot be read"),
        ("text.png", b"hello", "it is no picture"),
        ("empty.png", b"", "it is no picture"),
        ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n", "it is no picture"),
    ],
)
def test_what_is_no_picture_is_told_in_a_sentence(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=says) as refused:
        read_picture(tmp_path / name)
    assert name in str(refused.value) and "\n" not in str(refused.value)


def test_numbers_that_are_no_levels(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="floating-point"):
        read_picture(tmp_path / "f.tiff")
    Image.fromarray(np.full((8, 8), 70000, np.int32)).save(tmp_path / "i.tiff")
    with pytest.raises(ValueError, match="32-bit"):
        read_picture(tmp_path / "i.tiff")


def test_names_that_are_none(tmp_path):
    for path, says in ((tmp_path, "is a folder"), ("x" * 300, "too long"), ("no.png", "there is")):
        with pytest.raises(ValueError, match=says):
            read_picture(path)
        with pytest.raises(ValueError, match=says):
            Job("a cat", image=str(path))
        with pytest.raises(ValueError, match=says):
            What("a cat", image=path).request()
