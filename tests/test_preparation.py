"""Splits become shards: the same bytes however they are made, interrupted or read, and nothing unreadable unseen."""

import io
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.preparation import prepare
from modelstock.data.shapes.reference import reference_model
from modelstock.data.shapes.render import SPLITS, drawn
from modelstock.errors import DataError, ParamsError
from modelstock.params import ClassesParams, DrawnSplit, load_params
from tests.support import layouts
from tests.support.layouts import examples, picture, settings

PETS = ClassesParams(names=["cat", "dog"], templates=["a {}"])
SHAPES = ClassesParams(names="shapes", templates="shapes")


@pytest.fixture
def small():
    params = load_params().prepare
    splits = {name: DrawnSplit(source="shapes", images=36) for name in params.splits}
    return params.model_copy(update={"splits": splits, "reference_draws": 600, "reference_epochs": 1})


def test_preparing_a_split_writes_shards_and_a_picture_of_it(tmp_path, small):
    manifest = prepare("shapes-sketch", small, SHAPES, tmp_path)
    assert (manifest.count, manifest.role) == (36, "shift")
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.size == (12 * 64, 3 * 64)


def test_the_adversarial_split_holds_what_the_reference_model_gets_wrong(tmp_path, small):
    import torch

    from modelstock.data.images import normalise
    from modelstock.data.shapes.names import TINY_PREPROCESS

    prepare("shapes-adversarial", small, SHAPES, tmp_path)
    dataset = open_dataset(tmp_path)
    (images, labels), manifest = read_all(dataset), dataset.manifest
    reference = reference_model(small)
    with torch.inference_mode():
        logits = reference(normalise(images, TINY_PREPROCESS))
    guess = logits[:, [g[0] for g in manifest.label_groups]].argmax(dim=1).numpy()
    assert (guess != labels).all()
    assert np.bincount(labels).tolist() == [3] * 12


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path, small):
    with pytest.raises(DataError, match="got 'imagenet'; expected train, held-out"):
        prepare("imagenet", small, SHAPES, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_draws_go_on_without_end_and_without_repeating():
    source = drawn("train", seed=1)
    first = [next(source)[0].tobytes() for _ in range(600)]
    assert len(set(first)) == 600
    assert len(SPLITS["train"].labels) == 24


# Images on disk


def photos(count: int, size: tuple[int, int]) -> dict[str, bytes]:
    """`count` photographs of each class."""
    names = [(f"{folder}/{i:02d}.jpg", 100 * k + i) for k, folder in enumerate(PETS.names) for i in range(count)]
    return {name: picture(seed, "jpeg", size) for name, seed in names}


def pets(place: Path, count: int = 10, **others: bytes) -> Path:
    """A folder of photographs of 40x30 pixels, and other files of cats."""
    files = photos(count, (40, 30)) | {f"cat/{name}": content for name, content in others.items()}
    return layouts.folder(place / "pets", files)


def made(tmp_path, path, out="out", **given):
    name = given.pop("name", "test")
    return prepare(name, settings(path, name=name, **given), PETS, tmp_path / out, scratch=tmp_path / "scratch")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["folder", "tar.gz", "zip"])
@pytest.mark.parametrize("short_side", [None, 16])
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path, kind, short_side):
    files = {str(p.relative_to(tmp_path / "pets")): p.read_bytes() for p in pets(tmp_path).rglob("*.jpg")}
    path = layouts.packed(kind, files, tmp_path / "source")
    for workers in (1, 3):
        made(tmp_path, path, str(workers), workers=workers, short_side=short_side, shard_size=3)
    assert content(tmp_path / "1") == content(tmp_path / "3")
    assert len(content(tmp_path / "1")) == 7 + 2


def test_a_second_run_replaces_the_first_in_whole(tmp_path):
    path = pets(tmp_path)
    made(tmp_path, path, shard_size=3)
    manifest = made(tmp_path, path, shard_size=15)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["000000.tar", "000001.tar"]
    assert open_dataset(tmp_path / "out").manifest == manifest


def test_short_side_makes_larger_images_smaller_and_keeps_the_bytes_of_others(tmp_path):
    small = picture(1, "png", (24, 10))
    path = pets(tmp_path, **{"small.png": small, "wide.webp": picture(2, "webp", (90, 20))})
    manifest = made(tmp_path, path, short_side=16, quality=90)
    found = {key: (suffix, stored) for key, _, suffix, stored in examples(tmp_path / "out", manifest)}
    assert found["00000010"] == ("png", small)
    sizes = set()
    for suffix, stored in found.values():
        with Image.open(io.BytesIO(stored)) as image:
            sizes.add((suffix, image.size))
    assert sizes == {("jpg", (21, 16)), ("png", (24, 10)), ("jpg", (72, 16))}


def test_images_are_made_smaller_with_antialiasing(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8)  # no colour, which JPEG would blur
    buffer = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(buffer, "png")
    path = pets(tmp_path, 1, **{"00.jpg": buffer.getvalue()})
    manifest = made(tmp_path, path, short_side=30)
    with Image.open(io.BytesIO(examples(tmp_path / "out", manifest)[0][3])) as image:
        got = np.asarray(image)[..., 0].astype(float)
    import torch
    from torchvision.transforms.v2 import functional

    def reference(antialias):
        bicubic = functional.InterpolationMode.BICUBIC
        return functional.resize(torch.from_numpy(grey)[None], [30, 40], bicubic, antialias=antialias)[0].numpy()

    assert np.abs(got - reference(True)).mean() < 3
    assert np.abs(got - reference(False)).mean() > 30


def test_the_border_is_cut_before_images_are_made_smaller(tmp_path):
    path = layouts.folder(tmp_path / "unpacked", layouts.objectnet())
    found = prepare(
        "test",
        settings(path, labels="objectnet", short_side=6),
        layouts.IMAGENET,
        tmp_path / "out",
        scratch=tmp_path / "scratch",
    )
    assert found.border == 0
    images, _ = read_all(open_dataset(tmp_path / "out"))  # 12x10, less 2 on each side, is 8x6
    assert images.shape[1:] == (6, 8, 3)
    with Image.open(path / "objectnet-1.0/images/alarm_clock/0alarm_clock.png") as image:
        np.testing.assert_array_equal(images[0], np.asarray(image)[2:-2, 2:-2])


def test_images_of_other_kinds_become_png_and_suffixes_follow_the_content(tmp_path):
    path = pets(tmp_path, 1, **{"a.bmp": picture(1, "bmp"), "b.jpg": picture(2, "png"), "c.jpeg": picture(3, "webp")})
    manifest = made(tmp_path, path)
    found = [(suffix, stored) for _, label, suffix, stored in examples(tmp_path / "out", manifest) if label == 0]
    assert found[0] == ("jpg", (path / "cat/00.jpg").read_bytes())
    assert found[2:] == [("png", picture(2, "png")), ("webp", picture(3, "webp"))]
    assert found[1][0] == "png"
    with Image.open(io.BytesIO(found[1][1])) as image, Image.open(io.BytesIO(picture(1, "bmp"))) as original:
        np.testing.assert_array_equal(np.asarray(image), np.asarray(original))


BAD = {
    "x-empty.jpg": b"",
    "x-script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "x-text.jpg": b"<html>not found</html>",
    "x-truncated.jpg": picture(5, "jpeg", (40, 30))[:-200],
    "x-truncated.png": picture(5, "png", (40, 30))[:-200],
}


def test_unreadable_images_are_left_out_counted_and_listed(tmp_path):
    path = pets(tmp_path, **BAD)
    manifest = made(tmp_path, path, unreadable=0.2, shard_size=4, workers=2)
    assert manifest.unreadable == [f"cat/{name}" for name in sorted(BAD)]
    assert manifest.count == 20
    assert [s.name for s in manifest.shards] == [
        "000000.tar",
        "000001.tar",
        "000002.tar",
        "000003.tar",
        "000004.tar",
        "000005.tar",
        "000006.tar",
    ]
    keys = [key for key, *_ in examples(tmp_path / "out", manifest)]
    assert keys == [f"{i:08d}" for i in range(25) if not 10 <= i < 15]  # a key is the place in the list of the source


def test_a_shard_of_nothing_but_unreadable_images_is_none(tmp_path):
    manifest = made(tmp_path, pets(tmp_path, **BAD), unreadable=0.2, shard_size=5)
    assert [s.name for s in manifest.shards] == ["000000.tar", "000001.tar", "000003.tar", "000004.tar"]
    assert open_dataset(tmp_path / "out").manifest.count == 20


def test_too_many_unreadable_images_are_an_error_that_names_them(tmp_path):
    path = pets(tmp_path, **BAD)
    expected = (
        r"got 5 unreadable images of 25: cat/x-empty\.jpg, cat/x-script\.jpg, cat/x-text\.jpg and 2 more "
        r"\(UnidentifiedImageError: .*\); expected at most 4\.75; .*prepare\.unreadable"
    )
    with pytest.raises(DataError, match=expected):
        made(tmp_path, path, unreadable=0.19)
    assert not (tmp_path / "out").exists()


def test_a_picture_of_too_many_pixels_is_unreadable(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    path = pets(tmp_path, **{"x-huge.png": picture(1, "png", (60, 50))})
    assert made(tmp_path, path, unreadable=0.1).unreadable == ["cat/x-huge.png"]


def test_duplicates_are_kept(tmp_path):
    path = pets(tmp_path, **{"copy.jpg": picture(0, "jpeg", (40, 30))})
    assert made(tmp_path, path).count == 21


def test_the_picture_shows_an_even_spread(tmp_path):
    made(tmp_path, pets(tmp_path))
    with Image.open(tmp_path / "out/contact.png") as sheet:
        assert sheet.size == (12 * 64, 64)


def test_the_source_is_no_place_for_shards(tmp_path):
    path = pets(tmp_path)
    for out in ("pets", "pets/shards", "."):
        with pytest.raises(DataError, match="expected another folder; write elsewhere"):
            made(tmp_path, path, out)
    assert sorted(p.name for p in path.iterdir()) == ["cat", "dog"]


def test_a_file_that_changes_is_made_again(tmp_path):
    """A run that failed goes on with what is finished, unless the source is another by now."""
    path = pets(tmp_path, **BAD)
    for _ in range(2):
        with pytest.raises(DataError, match="5 unreadable"):
            made(tmp_path, path, shard_size=5, unreadable=0)
    for name in BAD:
        (path / "cat" / name).write_bytes(picture(9))
    assert made(tmp_path, path, shard_size=5, unreadable=0).count == 25


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_a_run_that_is_killed_goes_on_to_the_same_bytes(tmp_path, kind):
    path = layouts.packed(kind, photos(20, (900, 700)), tmp_path / "source")
    made(tmp_path, path, "whole", shard_size=2, short_side=600)
    options = "--name test --classes cat,dog --role shift --workers 2 --shard-size 2 --short-side 600"
    command = [sys.executable, "-m", "modelstock.cli", "prepare", str(path), "-o", str(tmp_path / "out")]
    command += options.split()
    finished: dict[str, int] = {}
    for kill in range(1, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and len(known := list(tmp_path.glob(".out.unfinished/*/*.json"))) < 4 * kill:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(np.random.default_rng().uniform(0, 0.05))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        while any(Path(f"/proc/{child}").exists() for child in children):
            assert time.monotonic() < deadline, "workers outlive the run that started them"
            time.sleep(0.01)
        assert not (tmp_path / "out").exists()
        known = list(tmp_path.glob(".out.unfinished/*/*.json"))
        now = {p.stem: p.with_suffix(".tar").stat().st_ino for p in known}
        assert finished.items() <= now.items()
        finished = now
    assert 8 <= len(finished) < 20
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert finished.items() <= {p.stem: p.stat().st_ino for p in (tmp_path / "out").glob("*.tar")}.items()
    assert not list(tmp_path.glob(".out.unfinished"))


# The command


def run(*arguments: object):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)], catch_exceptions=True)


def test_the_command_does_the_same_without_params(tmp_path):
    path = pets(tmp_path)
    (tmp_path / "names").write_text("cat\ta small tiger\ndog\ta small wolf\n")
    result = run(path, "-o", tmp_path / "out", "--classes", tmp_path / "names", "--role", "in-distribution")
    assert result.exit_code == 0, result.output
    assert "20 images, 2 labels, " in result.output
    manifest = open_dataset(tmp_path / "out").manifest
    assert (manifest.benchmark, manifest.role) == ("pets", "in-distribution")
    assert manifest.labels == ["a small tiger", "a small wolf"]
    run(
        path,
        "-o",
        tmp_path / "cut",
        "--classes",
        "cat,dog",
        "--role",
        "held-out",
        "--part",
        "held-out",
        "--held-out-per-class",
        3,
    )
    manifest = open_dataset(tmp_path / "cut").manifest
    assert (manifest.count, manifest.role) == (6, "held-out")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--role", "test", "--classes", "cat,dog"], "--role: got 'test' for 'pets'"),
        (["--role", "train", "--name", "x", "--classes", "cat,dog"], "--name: got 'x'; expected 'train'"),
        (["--role", "shift"], "--classes: got none"),
        (["--role", "shift", "--classes", "cat,cat"], "got 'cat,cat'; expected two names or more, each once"),
        (["--role", "shift", "--labels", "imagenet-x"], "labels: got 'imagenet-x'; expected classes, imagenet, "),
    ],
)
def test_its_mistakes_are_named(tmp_path, options, message):
    result = run(pets(tmp_path), "-o", tmp_path / "out", *options)
    assert isinstance(result.exception, ParamsError)
    assert message in str(result.exception)


def test_a_folder_whose_name_is_no_name_of_a_set_needs_one(tmp_path):
    path = pets(tmp_path).rename(tmp_path / "My Photos")
    arguments = [path, "-o", tmp_path / "out", "--classes", "cat,dog", "--role", "shift"]
    assert "--name: got 'my photos'; expected lower-case letters" in str(run(*arguments).exception)
    assert run(*arguments, "--name", "my-photos").exit_code == 0


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (
            "txt",
            "cat\ta\ndog\tb\ncat\tc",
            "'cat' 'a'; expected a folder, a tab and its name on every line, each folder",
        ),
        ("txt", "cat\ta\ndog", "'dog'; expected a folder, a tab and its name on every line"),
        ("json", '{"cat": "a", "dog": "b", "cat": "c"}', "'cat' 'a'; expected"),
        ("json", '["cat", "cat "]', "two names or more, each once"),
    ],
)
def test_a_file_of_classes_has_each_once(tmp_path, suffix, text, message):
    (tmp_path / f"names.{suffix}").write_text(text)
    options = ["-o", tmp_path / "out", "--role", "shift", "--classes", tmp_path / f"names.{suffix}"]
    result = run(pets(tmp_path), *options)
    assert isinstance(result.exception, ParamsError)
    assert message in str(result.exception)


def test_more_classes_than_a_files_name_has_room_for_may_be_listed(tmp_path):
    classes = ",".join(["cat", "dog", *(f"class-{i}" for i in range(100))])
    assert run(pets(tmp_path), "-o", tmp_path / "out", "--role", "shift", "--classes", classes).exit_code == 0


def test_it_does_not_replace_shards_unasked(tmp_path):
    arguments = [pets(tmp_path), "-o", tmp_path / "out", "--classes", "cat,dog", "--role", "shift"]
    assert run(*arguments).exit_code == 0
    assert "shards that exist" in str(run(*arguments).exception)
    assert run(*arguments, "--overwrite").exit_code == 0
