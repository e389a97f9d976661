"""Every kind of image file becomes the colours that people see in it, or is named with the reason why it cannot."""

import io
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms, features

from kdcache.datasets import Sample
from kdcache.datasets.canvas import Canvas, load_canvas
from kdcache.datasets.decoding import decode
from kdcache.datasets.folder import IMAGE_SUFFIXES, Folder
from kdcache.errors import IntegrityError

COLOUR = (200, 100, 50)
GREY = (100, 100, 100)

CanvasOf = Callable[..., Canvas]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The class folder `train/a` of a dataset that is complete but for the images that a test puts there."""
    for name in ("train/a", "train/b", "test/a"):
        (tmp_path / "images" / name).mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "images/train/b/filler.png")
    return tmp_path / "images/train/a"


def pixels_of(folder: Path, size: int = 8) -> dict[str, NDArray[np.uint8]]:
    """What the canvas holds of each file of `folder`, as `[H, W, 3]`."""
    root = folder.parent.parent
    canvas = load_canvas(Folder(str(root)), "train", size, root.parent / "canvases")
    assert canvas.intact
    return {
        key.removeprefix("a/"): pixels.transpose(1, 2, 0)
        for key, pixels in zip(canvas.keys, canvas.pixels, strict=True)
        if key.startswith("a/")
    }


def reason_of(folder: Path, file: str) -> str:
    """What the error says of `file`, the only one that cannot be decoded."""
    with pytest.raises(IntegrityError, match=r"^error: 1 of \d+ images") as caught:
        pixels_of(folder)
    return caught.value.what.partition(f"a/{file} (")[2]


def in_palette() -> Image.Image:
    image = Image.new("P", (6, 4), 3)
    image.putpalette([0, 0, 0, 9, 9, 9, 0, 255, 0, *COLOUR])
    return image


def in_lab() -> Image.Image:
    image = ImageCms.profileToProfile(
        Image.new("RGB", (6, 4), COLOUR), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    assert image is not None
    return image


def deep(value: int, dtype: str = "<u2") -> Image.Image:
    return Image.fromarray(np.full((4, 6), value, dtype))


# file name -> image, options of its writing, the colour that people see
FILES: dict[str, tuple[Callable[[], Image.Image], dict[str, Any], tuple[int, int, int]]] = {
    "bit-0.png": (lambda: Image.new("1", (6, 4), 0), {}, (0, 0, 0)),
    "bit-1.png": (lambda: Image.new("1", (6, 4), 1), {}, (255, 255, 255)),
    "bit-1.tif": (lambda: Image.new("1", (6, 4), 1), {"compression": "group4"}, (255, 255, 255)),
    "grey.png": (lambda: Image.new("L", (6, 4), 100), {}, GREY),
    "grey.jpg": (lambda: Image.new("L", (6, 4), 100), {"quality": 100}, GREY),
    "grey-alpha.png": (lambda: Image.new("LA", (6, 4), (100, 30)), {}, GREY),
    "palette.png": (in_palette, {}, COLOUR),
    "palette.gif": (in_palette, {}, COLOUR),
    "palette-transparent.gif": (in_palette, {"transparency": 3}, COLOUR),
    "palette-transparent.png": (in_palette, {"transparency": 3}, COLOUR),
    "palette-alpha.png": (in_palette, {"transparency": bytes([0, 255, 7, 40])}, COLOUR),
    "colour.jpg": (lambda: Image.new("RGB", (6, 4), COLOUR), {"quality": 100, "subsampling": 0}, COLOUR),
    "colour-transparent.png": (lambda: Image.new("RGB", (6, 4), COLOUR), {"transparency": COLOUR}, COLOUR),
    "alpha.png": (lambda: Image.new("RGBA", (6, 4), (*COLOUR, 17)), {}, COLOUR),
    "alpha.tif": (lambda: Image.new("RGBA", (6, 4), (*COLOUR, 17)), {}, COLOUR),
    "alpha.webp": (lambda: Image.new("RGBA", (6, 4), (*COLOUR, 17)), {"lossless": True, "exact": True}, COLOUR),
    "ink.tif": (lambda: Image.new("CMYK", (6, 4), (55, 155, 205, 0)), {}, COLOUR),
    "ink.jpg": (lambda: Image.new("CMYK", (6, 4), (55, 155, 205, 0)), {"quality": 100, "subsampling": 0}, COLOUR),
    "lab.tif": (in_lab, {}, COLOUR),
    "ycc.tif": (lambda: Image.new("RGB", (6, 4), COLOUR).convert("YCbCr"), {}, COLOUR),
    "16-bit.png": (lambda: deep(100 * 257), {}, GREY),
    "16-bit.tif": (lambda: deep(100 * 257), {}, GREY),
    "16-bit-big-endian.tif": (lambda: deep(100 * 257, ">u2"), {}, GREY),
    "16-bit.pgm": (lambda: deep(100 * 257), {}, GREY),
    "32-bit.tif": (lambda: deep(100 * 257, "<i4"), {}, GREY),
    "float.tif": (lambda: Image.new("F", (6, 4), 100 / 255), {}, GREY),
    "float.pfm": (lambda: Image.new("F", (6, 4), 100 / 255), {}, GREY),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_any_mode_keeps_its_colour(folder: Path, name: str) -> None:
    make, options, colour = FILES[name]
    make().save(folder / name, **options)
    pixels = pixels_of(folder)[name]
    assert np.abs(pixels.astype(int) - colour).max() <= 2, pixels[0, 0]


def test_the_files_above_really_are_of_different_modes(folder: Path) -> None:
    modes = set()
    for name, (make, options, _) in FILES.items():
        make().save(folder / name, **options)
        with Image.open(folder / name) as image:
            modes.add(image.mode)
    assert modes >= {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I;16B", "I", "F"}


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("La", (6, 4), (50, 128)), GREY),  # these two are multiplied with alpha
        (Image.new("RGBa", (6, 4), (100, 50, 25, 128)), COLOUR),
        (Image.new("RGBX", (6, 4), (*COLOUR, 9)), COLOUR),
        (in_palette().convert("PA"), COLOUR),
        (Image.new("RGB", (6, 4), COLOUR).convert("HSV"), COLOUR),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_a_mode_that_no_file_has_but_a_source_may_hand_out_keeps_its_colour(image: Image.Image, colour: Any) -> None:
    decoded = decode(Sample("x", 0, image.copy), 8)
    assert not isinstance(decoded, str), decoded
    assert np.abs(np.frombuffer(decoded[0], np.uint8).reshape(3, -1).T.astype(int) - colour).max() <= 2


def test_a_jpeg_of_ycck_as_photoshop_writes_it_keeps_its_grey(folder: Path) -> None:
    buffer = io.BytesIO()
    # Pillow writes CMYK only, inverted as Adobe's; marked as YCCK, the same numbers mean Y 155, Cb and Cr 128, no black.
    Image.new("CMYK", (16, 16), (100, 127, 127, 0)).save(buffer, "JPEG", quality=100, subsampling=0)
    data = bytearray(buffer.getvalue())
    transform = data.index(b"Adobe") + 11
    assert data[transform] == 0
    data[transform] = 2
    (folder / "x.jpg").write_bytes(data)
    with Image.open(folder / "x.jpg") as image:
        assert image.mode == "CMYK"
    assert np.abs(pixels_of(folder)["x.jpg"].astype(int) - GREY).max() <= 2


def test_sixteen_bits_are_scaled_and_never_clipped(folder: Path) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("x.png", "x.tif"):
        Image.fromarray(values).save(folder / name)
    for pixels in pixels_of(folder).values():
        np.testing.assert_array_equal(pixels, np.repeat(values[..., None] >> 8, 3, axis=2))


def test_a_colour_png_of_sixteen_bits_keeps_its_colour(folder: Path) -> None:
    row = b"\0" + struct.pack(">3H", *(value * 257 for value in COLOUR)) * 4
    (folder / "x.png").write_bytes(png(4, 4, bits=16, colour=2, data=zlib.compress(row * 4)))
    assert (pixels_of(folder)["x.png"] == COLOUR).all()


def png(width: int, height: int, *, bits: int, colour: int, data: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.full((4, 4), 70000, np.int32), "70000"),
        (np.full((4, 4), -3, np.int32), "-3"),
        (np.full((4, 4), 2.5, np.float32), "2.5"),
        (np.full((4, 4), -0.5, np.float32), "-0.5"),
        (np.array([[0.5, np.nan]], np.float32), "nan"),
    ],
)
def test_numbers_without_an_agreed_meaning_as_grey_are_refused_not_clipped(folder: Path, values: Any, said: str) -> None:
    Image.fromarray(values).save(folder / "x.tif")
    reason = reason_of(folder, "x.tif")
    assert said in reason
    assert "mode" in reason


# ---------------------------------------------------------------- EXIF


UPRIGHT = np.zeros((16, 24, 3), np.uint8)  # red, green, blue and white quarters: no turn of it looks like another
UPRIGHT[:8, :12], UPRIGHT[:8, 12:], UPRIGHT[8:, :12], UPRIGHT[8:, 12:] = (255, 0, 0), (0, 255, 0), (0, 0, 255), 255

STORED: dict[int, Callable[[Any], Any]] = {  # EXIF orientation: how a camera stores the upright picture
    1: lambda up: up,
    2: lambda up: up[:, ::-1],
    3: lambda up: up[::-1, ::-1],
    4: lambda up: up[::-1],
    5: lambda up: up.swapaxes(0, 1),
    6: lambda up: np.rot90(up, 1),
    7: lambda up: up[::-1, ::-1].swapaxes(0, 1),
    8: lambda up: np.rot90(up, -1),
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_every_exif_orientation_ends_upright(folder: Path, suffix: str) -> None:
    for orientation, store in STORED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {"quality": 100} if suffix == "jpg" else {}
        Image.fromarray(np.ascontiguousarray(store(UPRIGHT))).save(folder / f"{orientation}.{suffix}", exif=exif, **options)
    root = folder.parent.parent
    canvas = load_canvas(Folder(str(root)), "train", 24, root.parent / "canvases")
    expected = np.asarray(Image.fromarray(UPRIGHT).resize((24, 24), Image.Resampling.BILINEAR)).astype(int)
    for i in range(8):
        corners = canvas.pixels[i].transpose(1, 2, 0)[2::19, 2::19]
        assert np.abs(corners - expected[2::19, 2::19]).max() <= 16, canvas.keys[i]
        assert canvas.sizes[i].tolist() == [24, 16], canvas.keys[i]


@pytest.mark.parametrize("orientation", [0, 9, 255])
def test_an_orientation_that_does_not_exist_changes_nothing(folder: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(UPRIGHT).save(folder / "x.png", exif=exif)
    assert pixels_of(folder, 24)["x.png"][2, 2].tolist() == [255, 0, 0]


def test_damaged_exif_data_do_not_make_a_picture_corrupt(folder: Path) -> None:
    Image.fromarray(UPRIGHT).save(folder / "x.jpg", quality=100, exif=b"Exif\0\0this is no TIFF header")
    assert np.abs(pixels_of(folder, 24)["x.jpg"][2, 2].astype(int) - (255, 0, 0)).max() <= 8


# ---------------------------------------------------------------- shapes, frames, names


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3)])
def test_a_picture_one_pixel_wide_keeps_its_colours(folder: Path, shape: tuple[int, int]) -> None:
    values = np.zeros((*shape, 3), np.uint8)
    values[:] = COLOUR
    Image.fromarray(values).save(folder / "x.png")
    assert (pixels_of(folder)["x.png"] == COLOUR).all()


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_of_several_frames_the_first_counts(folder: Path, suffix: str) -> None:
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 0, 255)))
    options = {"lossless": True} if suffix == "webp" else {}
    first.save(folder / f"x.{suffix}", save_all=True, append_images=[second], **options)
    with Image.open(folder / f"x.{suffix}") as image:
        assert getattr(image, "n_frames", 1) == 2
    assert (pixels_of(folder)[f"x.{suffix}"] == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_suffix_that_counts_as_an_image_can_be_read(folder: Path, suffix: str) -> None:
    if suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    image = Image.new("F", (6, 4), 1.0) if suffix == ".pfm" else Image.new("RGB", (6, 4), (255, 255, 255))
    image.convert("1" if suffix == ".pbm" else image.mode).save(folder / f"x{suffix}")
    image.convert("1" if suffix == ".pbm" else image.mode).save(folder / f"y{suffix.upper()}")
    assert all((pixels >= 250).all() for pixels in pixels_of(folder).values())
    assert len(pixels_of(folder)) == 2


@pytest.mark.parametrize("name", ["x.h5", "x.pdf", "x.mpg", "x.eps", "x.txt", "x.npy", "x", ".hidden.png", "Thumbs.db"])
def test_a_file_of_another_kind_is_no_sample(folder: Path, name: str) -> None:
    Image.new("RGB", (4, 4)).save(folder / "only.png")
    (folder / name).write_bytes(b"%PDF-1.4 or whatever else it may be")
    assert list(pixels_of(folder)) == ["only.png"]


def test_names_are_kept_letter_by_letter(folder: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    names = [composed, decomposed, "日本 語.png", "with spaces .png", "😀.png", "quo'te\".png", "100%,=.png"]
    for i, name in enumerate(names):
        Image.new("RGB", (4, 4), (i, i, i)).save(folder / name)
    if len(list(folder.iterdir())) < len(names):
        pytest.skip("this file system takes the two forms of é for one name")
    decoded = pixels_of(folder)
    assert sorted(decoded) == sorted(names)
    assert {name: int(pixels[0, 0, 0]) for name, pixels in decoded.items()} == {name: i for i, name in enumerate(names)}


# ---------------------------------------------------------------- files that cannot be decoded


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "gif", "webp", "bmp"])
def test_half_a_file_is_named_with_a_reason(folder: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"x.{suffix}")
    whole = (folder / f"x.{suffix}").read_bytes()
    (folder / f"x.{suffix}").write_bytes(whole[: len(whole) // 2])
    assert len(reason_of(folder, f"x.{suffix}")) > 5


@pytest.mark.parametrize("content", [b"", b"\0", b"just a text", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_only_bears_the_name_of_an_image_is_named(folder: Path, content: bytes) -> None:
    (folder / "x.jpg").write_bytes(content)
    assert reason_of(folder, "x.jpg").startswith("not an image of a known format)")


def test_a_picture_of_absurd_size_is_refused_before_it_takes_the_memory(folder: Path) -> None:
    (folder / "bomb.png").write_bytes(png(100_000, 100_000, bits=8, colour=2, data=zlib.compress(bytes(1000))))
    assert "10,000,000,000 pixels" in reason_of(folder, "bomb.png")


def test_a_large_picture_that_pillow_only_warns_of_is_decoded_in_silence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (10, 8), COLOUR).save(folder / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # 80 pixels: between the limit and twice the limit
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (pixels_of(folder)["x.png"] == COLOUR).all()
    assert not caught


@pytest.fixture(scope="module")
def some_files() -> dict[str, bytes]:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 10, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for kind in ("JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP", "TGA", "PCX", "SGI", "PPM", "JPEG2000"):
        buffer = io.BytesIO()
        noise.save(buffer, kind, **({"exif": exif} if kind in {"JPEG", "PNG", "WEBP"} else {}))
        files[kind] = buffer.getvalue()
    return files


@given(data=st.data())
def test_damage_anywhere_in_a_file_gives_pixels_or_a_reason_and_nothing_else(
    some_files: dict[str, bytes], data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(sorted(some_files)))
    content = bytearray(some_files[kind])
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = decode(Sample("x", 0, lambda: Image.open(io.BytesIO(content))), 8)
    if isinstance(result, str):
        assert result
        assert "\n" not in result
    else:
        assert len(result[0]) == 3 * 8 * 8
        assert min(result[1]) >= 1


def test_an_unreadable_disk_is_not_taken_for_a_corrupt_picture(folder: Path) -> None:
    def load() -> Image.Image:
        raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output") as caught:
        decode(Sample("a/x.png", 0, load), 8)
    assert caught.value.filename == "a/x.png"
