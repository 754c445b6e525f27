"""One decoder: the pixels of training, validation, evaluation and statistics are those of open_clip's evaluation."""

import ast
import io
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.datasets.folder import pil_loader

from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.decoder import Unreadable, decode, facts_of
from modelstock.data.images import Framing, normalise
from modelstock.data.manifest import make_manifest, save_manifest
from modelstock.data.preparation import prepare
from modelstock.data.shards import write_shard
from modelstock.errors import DataError
from modelstock.notices import Notice
from modelstock.params import ClassesParams
from modelstock.scoring.data_statistics import sample
from modelstock.scoring.decoding import DecodedBatches
from modelstock.training.batches import Augmentation, TrainingBatches
from modelstock.training.validation import validation_batches
from modelstock.weights.weight_set import WeightSet
from tests.support.layouts import folder, picture, settings

ROOT = Path(__file__).parent.parent
PREPROCESS = {"size": 24, "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
ONE_CLASS = {"role": "shift", "labels": ["a"], "label_groups": [[0]], "classes": ["a"]}
# What Pillow writes in each format, of the modes that have at most 8 bits a channel.
MODES = {
    "png": ("1", "L", "LA", "P", "P transparent", "RGB", "RGBA"),
    "jpeg": ("L", "RGB", "CMYK"),
    "gif": ("1", "L", "P", "P transparent", "RGB", "RGBA"),
    "webp": ("L", "RGB", "RGBA", "P transparent"),
    "tiff": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
    "bmp": ("1", "L", "P", "RGB", "RGBA"),
    "ppm": ("1", "L", "RGB"),
    "jpeg2000": ("L", "LA", "RGB", "RGBA"),
}
SIZES = [(24, 24), (24, 40), (61, 24), (50, 37), (7, 9), (1, 30)]


def drawn(mode: str, size: tuple[int, int], seed: int = 0) -> Image.Image:
    """Smooth areas and noise in a mode; "P transparent" is a palette with a transparent colour."""
    width, height = size
    random = np.random.default_rng([seed, width, height])
    smooth = Image.fromarray(random.integers(0, 255, (4, 4, 4), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = (np.asarray(smooth).astype(int) + random.integers(-40, 40, (height, width, 4))).clip(0, 255)
    image = Image.fromarray(noisy.astype(np.uint8), "RGBA")
    if mode.startswith("P"):
        image = image.convert("RGB").quantize(16)
        if "transparent" in mode:
            image.info["transparency"] = 3
        return image
    return image if mode == "RGBA" else image.convert("LA" if mode == "LA" else "RGB").convert(mode)


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **image.info, **options)
    return buffer.getvalue()


def deep(kind: str) -> bytes:
    """An image of more than 8 bits a channel, dark to bright."""
    ramp = np.add.outer(np.arange(30), np.arange(30)) * 1000
    arrays = {"I;16": ramp.astype(np.uint16), "I": ramp.astype(np.int32), "F": ramp.astype(np.float32)}
    mode, _, suffix = kind.rpartition(" ")
    return file_of(Image.fromarray(arrays[mode]), suffix)


DEEP = ["I;16 png", "I;16 tiff", "I tiff", "F tiff", "I ppm", "F ppm", "I;16 jpeg2000"]


def stored(place: Path, contents: list[bytes], suffix: str = "png"):
    """A folder of one shard with these image files, of one class, as one who knows nothing of them would make it."""
    place.mkdir(parents=True, exist_ok=True)
    shard = write_shard(place / "0.tar", [(i, 0, suffix, content) for i, content in enumerate(contents)])
    save_manifest(place, make_manifest(benchmark="b", **ONE_CLASS, shards=[shard]))
    return open_dataset(place)


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_every_mode_of_every_format_in_every_size_has_the_pixels_of_image_folder_and_open_clip(
    tmp_path, kind, interpolation
):
    preprocess = {**PREPROCESS, "interpolation": interpolation}
    transform = open_clip.image_transform(24, is_train=False, mean=PREPROCESS["mean"], std=PREPROCESS["std"])
    if interpolation == "bilinear":
        transform = open_clip.image_transform(
            24, is_train=False, mean=PREPROCESS["mean"], std=PREPROCESS["std"], interpolation="bilinear"
        )
    for mode in MODES[kind]:
        for size in SIZES:
            content = file_of(drawn(mode, size), kind)
            (tmp_path / "image").write_bytes(content)
            expected = transform(pil_loader(str(tmp_path / "image")))
            framed = Framing.of(preprocess)(decode(content))
            torch.testing.assert_close(normalise(framed[None], preprocess)[0], expected, rtol=1e-6, atol=1e-6)


def test_training_validation_statistics_and_evaluation_see_the_same_pixels(tmp_path):
    modes = ("1", "L", "LA", "P", "P transparent", "RGB", "RGBA")
    contents = [file_of(drawn(mode, (50, 37)), "png") for mode in modes]
    dataset = stored(tmp_path, contents)
    framing = Framing.of(PREPROCESS)
    expected = np.stack([framing(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents])
    (evaluated,), _ = DecodedBatches(dataset, [framing], 99)[0]
    np.testing.assert_array_equal(evaluated, expected)
    for in_memory in (False, True):
        examples = dataset.examples(in_memory=in_memory)
        (validated, _), *_ = validation_batches(examples, PREPROCESS, batch_size=500)
        torch.testing.assert_close(validated, normalise(expected, PREPROCESS))
        for row, content in enumerate(contents):  # what training crops from
            np.testing.assert_array_equal(examples.image(row), np.array(Image.open(io.BytesIO(content)).convert("RGB")))


def test_the_statistics_of_data_see_the_same_pixels(tmp_path, monkeypatch):
    contents = [file_of(drawn(mode, (50, 37)), "png") for mode in ("P", "LA", "RGBA")]
    dataset = stored(tmp_path, contents)
    monkeypatch.setattr(type(dataset), "check_classes", lambda *_: None)

    head = {"head.weight": np.zeros((2, 4), np.float32), "head.bias": np.zeros(2, np.float32)}
    weights = WeightSet(head, {"architecture": {}, "preprocess": PREPROCESS}, "anchor")
    images, _ = sample(dataset, weights, examples=3)
    expected = [Framing.of(PREPROCESS)(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents]
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_a_channel_is_refused_and_never_white(kind):
    with pytest.raises(Unreadable, match=r"^more than 8 bits a channel \(mode .*\): convert it to 8 bits$"):
        decode(deep(kind))


def test_16_bit_grey_images_are_unreadable_in_prepare_with_the_reason(tmp_path):
    path = folder(tmp_path / "xray", {f"cat/{i}.png": deep("I;16 png") for i in range(3)})
    classes = ClassesParams(names=["cat", "dog"], templates=["{}"])
    expected = r"got 3 unreadable images of 3: .* \(more than 8 bits a channel \(mode I;16\): convert it to 8"
    with pytest.raises(DataError, match=expected):
        prepare("test", settings(path), classes, tmp_path / "out", scratch=tmp_path / "scratch")


def png_head(width: int, height: int) -> bytes:
    """A PNG that says it is as large as this, and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GOOD = picture(1, "png", (40, 30))
HOSTILE = {
    "nothing": b"",
    "zeros": bytes(5000),
    "text": b"<html>not found</html>",
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ran) (w) file\n",
    "PSD": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3" + bytes(400),
    "FITS": b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + bytes(2800),
    "WMF": b"\xd7\xcd\xc6\x9a\0\0" + bytes(34),
    "GIF of 65535 x 65535": b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b";",
    "PNG of 400 million pixels": png_head(20_000, 20_000),
    "PNG of 100 million pixels": png_head(10_000, 10_000),
    "PNG of two billion pixels a side": png_head(2**31 - 1, 2**31 - 1),
    "PNG cut short": GOOD[:-300],
    "PNG damaged": GOOD[:60] + b"\xff\xff\xff\xff" + GOOD[64:],
    "JPEG cut short": picture(1, "jpeg", (40, 30))[:-300],
    "WebP cut short": picture(1, "webp", (40, 30))[:-300],
    "TIFF cut short": picture(1, "tiff", (40, 30))[:200],
    "JPEG 2000 cut short": picture(1, "jpeg2000", (40, 30))[:60],
    "BMP cut short": picture(1, "bmp", (40, 30))[:60],
    "PPM cut short": b"P6 40 30 255\n\0\0",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_or_damaged_image_is_one_line_wherever_it_is_read_and_starts_no_program(tmp_path, name, monkeypatch):
    def started(*arguments, **_):
        raise AssertionError(f"a program was started: {arguments}")

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr("os.system", started)
    with pytest.raises(Unreadable) as caught:
        decode(HOSTILE[name])
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # the same text in every process
    dataset = stored(tmp_path, [HOSTILE[name]], "jpg")
    line = r"example 0: got .*; expected an image that decodes; run the stage prepare again for this split$"
    with pytest.raises(DataError, match=line):
        read_all(dataset)
    with pytest.raises(DataError, match=line):
        next(DecodedBatches(dataset, [Framing.of(PREPROCESS)], 1).load(0, workers=0, pin=False))
    with pytest.raises(DataError, match=line):
        next(validation_batches(dataset.images, PREPROCESS, batch_size=500))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["text", "PNG cut short"])
def test_training_names_an_image_that_does_not_decode(tmp_path, workers, name):
    dataset = stored(tmp_path, [GOOD, GOOD, HOSTILE[name], GOOD])
    augmentation = Augmentation(crop_scale=(0.5, 1.0))
    data = TrainingBatches(dataset.images, augmentation, PREPROCESS, batch_size=4, seed=0, name="finetune")
    with pytest.raises(DataError, match=r"example 2: got .*; expected an image that decodes"):
        list(data.load(0, 2, workers=workers, pin=False))


def test_a_file_is_what_its_content_is_and_not_what_its_name_is():
    assert facts_of(picture(1, "tiff")).format == "TIFF"
    assert decode(picture(1, "bmp")).size == (8, 8)


def test_images_are_opened_in_one_place_of_the_library():
    """Any other place might forget the list of formats, the limit of pixels or the conversion to RGB."""
    places = []
    for file in sorted(path for top in ("modelstock", "stages", "flows") for path in (ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name in ("Image.open", "PIL.Image.open", "pil_loader", "decode_image", "read_image", "imread"):
                places.append(str(file.relative_to(ROOT)))
    assert places == ["modelstock/data/decoder.py"]


# What is unusual and usable is a notice, and the manifest keeps it


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file_of(drawn("RGB", (40, 30), orientation), "jpeg", exif=exif)


def test_orientation_in_exif_is_ignored_as_open_clip_does_and_counted_in_a_notice(tmp_path):
    files = {"cat/a.jpg": turned(6), "cat/b.jpg": turned(1), "dog/a.jpg": turned(3), "dog/b.jpg": turned(0)}
    files["dog/c.gif"] = file_of(drawn("P", (40, 30)), "gif", save_all=True, append_images=[drawn("P", (40, 30), 1)])
    path = folder(tmp_path / "photos", files)
    classes = ClassesParams(names=["cat", "dog"], templates=["{}"])
    with pytest.warns(Notice) as given:
        manifest = prepare("test", settings(path), classes, tmp_path / "out", scratch=tmp_path / "scratch")
    assert manifest.notices == [
        "2 of 5 images have an EXIF orientation, which is not applied, as open_clip applies none: "
        "turn the pixels of photographs first",
        "1 of 5 images have several frames, of which the first is used",
    ]
    assert [str(warning.message) for warning in given] == [f"test: {line}" for line in manifest.notices]
    assert open_dataset(tmp_path / "out").manifest == manifest
    assert open_dataset(tmp_path / "out").images.size(0) == (30, 40)
    plain = prepare("test", settings(path), classes, tmp_path / "again", scratch=tmp_path / "scratch")
    assert (tmp_path / "again/manifest.json").read_bytes() == (tmp_path / "out/manifest.json").read_bytes()
    assert plain.sha256 == manifest.model_copy(update={"notices": []}).sha256
