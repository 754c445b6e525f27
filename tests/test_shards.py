"""Shards: bytes that repeat, examples that come back pixel for pixel, damage that is named."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from modelstock.data import manifest as manifests
from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.index import IMAGES, index_shards
from modelstock.data.manifest import Shard, make_manifest, save_manifest
from modelstock.data.shapes.render import draw
from modelstock.data.shards import write_shard
from modelstock.errors import DataError, WeightsError
from modelstock.files import sha256_of
from modelstock.scoring.one_pass import score
from modelstock.weights.weight_set import WeightSet
from tests.support import layouts
from tests.support.layouts import picture
from tests.support.splits import make_split


def test_the_same_examples_give_the_same_bytes(tmp_path):
    make_split(tmp_path / "a", "shapes", 120)
    make_split(tmp_path / "b", "shapes", 120)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000.tar", "000001.tar", "000002.tar", "manifest.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_images_and_labels_come_back_in_order_and_exact(tmp_path):
    make_split(tmp_path, "shapes-objectnet", 110)
    dataset = open_dataset(tmp_path)
    (images, labels), manifest = read_all(dataset), dataset.manifest
    expected, truth = draw("shapes-objectnet", range(110), seed=3)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(labels, truth)
    assert manifest.label_groups[manifest.labels.index("wheel")] == [
        manifest.classes.index(c) for c in ("disc", "ring", "gear")
    ]


def test_any_webdataset_reader_can_read_them_and_nothing_in_them_names_their_maker(tmp_path):
    make_split(tmp_path, "shapes", 10)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:2]] == ["00000000.cls", "00000000.png"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        with Image.open(io.BytesIO(tar.extractfile(members[1]).read())) as image:
            assert image.size == (32, 32)


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip"])
def test_a_damaged_shard_is_named_before_anything_is_read(tmp_path, damage):
    make_split(tmp_path, "shapes", 120)
    shard = tmp_path / "000001.tar"
    content = bytearray(shard.read_bytes())
    if damage == "remove":
        shard.unlink()
    else:
        content[600] ^= 1
        shard.write_bytes(content if damage == "flip" else content[:-1000])
    with pytest.raises(DataError, match=r"000001\.tar: got .*; expected sha256 .* with 50 examples; run the stage"):
        open_dataset(tmp_path)


def test_a_folder_without_or_with_a_wrong_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: got No such file"):
        open_dataset(tmp_path)
    (tmp_path / "manifest.json").write_text('{"benchmark": 3}')
    with pytest.raises(DataError, match=r"benchmark: .*, role: Field required"):
        open_dataset(tmp_path)


def test_an_example_without_an_image_or_with_a_wild_label_is_refused(tmp_path):
    manifest = make_split(tmp_path, "shapes", 10)
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        entry = tarfile.TarInfo("x.cls")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"99"))
    with pytest.raises(DataError, match=r"000000\.tar: got 1 examples, x without image or valid label; expected 10"):
        index_shards(tmp_path, manifest)


def mixed(folder, sizes, border=0, root=None):
    """Shards of images of these sizes (width, height), of every kind in turn."""
    kinds = {"jpg": "jpeg", "jpeg": "jpeg", "png": "png", "webp": "webp"}
    files = [(i, 0, s, picture(i, kinds[s], size)) for i, (s, size) in enumerate(zip(IMAGES * 9, sizes, strict=False))]
    place = root or folder
    place.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
    shards = [write_shard(place / f"{n}.tar", files[3 * n : 3 * n + 3]) for n in range(-(-len(files) // 3))]
    manifest = make_manifest(
        benchmark="b",
        role="shift",
        labels=["a"],
        label_groups=[[0]],
        classes=["a", "b"],
        shards=shards,
        border=border,
        root=root and str(root),
    )
    save_manifest(folder, manifest)
    return manifest, files


@pytest.mark.parametrize("border", [0, 2])
def test_every_reader_finds_images_of_every_kind_wherever_they_are_and_cuts_the_border(tmp_path, border):
    manifest, files = mixed(tmp_path / "data", [(9, 7)] * 5, border, tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "data").manifest == manifest
    expected = []
    for *_, content in files:
        with Image.open(io.BytesIO(content)) as image:
            expected.append(np.asarray(image.convert("RGB"))[border : 7 - border, border : 9 - border])
    dataset = open_dataset(tmp_path / "data")
    np.testing.assert_array_equal(read_all(dataset)[0], expected)
    streamed = dataset.examples(in_memory=False)
    for row in range(5):
        np.testing.assert_array_equal(streamed.image(row), expected[row])
        assert streamed.size(row) == expected[row].shape[:2]
    places, labels = index_shards(tmp_path / "data", manifest)
    assert labels.tolist() == [0] * 5
    for (shard, start, length), (*_, content) in zip(places.tolist(), files, strict=True):
        assert (tmp_path / f"elsewhere/{shard}.tar").read_bytes()[start : start + length] == content


def test_images_of_several_sizes_are_not_for_memory(tmp_path):
    mixed(tmp_path / "data", [(8, 8), (8, 8), (9, 8)])
    dataset = open_dataset(tmp_path / "data")
    with pytest.raises(DataError, match=r"example 2: got .* 9x8 pixels after .* 8x8; .*loading\.in_memory: false"):
        dataset.examples(in_memory=True)
    assert dataset.examples(in_memory=False).size(2) == (8, 9)


def test_the_identity_of_data_is_that_of_its_pixels_and_labels(tmp_path):
    one, _ = mixed(tmp_path / "one", [(8, 8)] * 4)
    two, _ = mixed(tmp_path / "two", [(8, 8)] * 4, root=tmp_path / "elsewhere")
    cut, _ = mixed(tmp_path / "cut", [(8, 8)] * 4, border=1)
    assert one.sha256 == two.sha256 != cut.sha256


def test_a_missing_shard_of_another_folder_is_named(tmp_path):
    mixed(tmp_path / "data", [(8, 8)] * 4, root=tmp_path / "elsewhere")
    (tmp_path / "elsewhere/1.tar").unlink()
    with pytest.raises(DataError, match=r"elsewhere/1\.tar: got no such file"):
        open_dataset(tmp_path / "data")


def test_a_data_set_is_hashed_once_per_process_until_a_shard_is_replaced(tmp_path, anchor, monkeypatch):
    """A greedy search scores candidates one after another, each time on the same folder."""
    hashed = []
    monkeypatch.setattr(manifests, "sha256_of", lambda file: hashed.append(file.name) or sha256_of(file))
    make_split(tmp_path, "shapes", 120)
    for step in range(3):
        tensors = {**anchor.tensors, "head.bias": anchor.tensors["head.bias"] + np.float32(step)}
        score(open_dataset(tmp_path), [WeightSet(tensors, anchor.meta, f"candidate {step}")])
    assert sorted(hashed) == ["000000.tar", "000001.tar", "000002.tar"]
    make_split(tmp_path, "shapes-v2", 120)
    score(open_dataset(tmp_path), [anchor])
    assert len(hashed) == 6


def test_a_shard_that_is_used_in_place_is_hashed_again_when_it_was_replaced(tmp_path):
    mixed(tmp_path / "data", [(8, 8)] * 4, root=tmp_path / "elsewhere")
    assert open_dataset(tmp_path / "data") is open_dataset(tmp_path / "data")
    (tmp_path / "elsewhere/1.tar").write_bytes(b"another")
    with pytest.raises(DataError, match=r"elsewhere/1\.tar: got sha256"):
        open_dataset(tmp_path / "data")


def test_two_images_of_one_key_are_refused(tmp_path):
    layouts.tar(tmp_path / "0.tar", {"a.cls": b"0", "a.jpg": picture(0), "a.png": picture(0, "png")})
    shards = [Shard(name="0.tar", count=1, sha256=sha256_of(tmp_path / "0.tar"))]
    facts = {"benchmark": "b", "role": "shift", "labels": ["a"], "label_groups": [[0]], "classes": ["a", "b"]}
    with pytest.raises(DataError, match=r"0\.tar: got two images a"):
        index_shards(tmp_path, make_manifest(**facts, shards=shards))


def test_a_file_that_pretends_to_be_an_image_is_not_handed_to_other_programs(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    shards = [write_shard(tmp_path / "0.tar", [(0, 0, "png", postscript)])]
    facts = {"benchmark": "b", "role": "shift", "labels": ["a"], "label_groups": [[0]], "classes": ["a", "b"]}
    save_manifest(tmp_path, make_manifest(**facts, shards=shards))
    with pytest.raises(DataError, match="example 0: got UnidentifiedImageError: nothing that begins like JPEG, PNG"):
        open_dataset(tmp_path).images.image(0)


def test_a_head_for_other_classes_is_refused(tmp_path, anchor):
    make_split(tmp_path, "shapes", 10)
    dataset = open_dataset(tmp_path)
    dataset.check_classes(anchor)
    other = WeightSet(anchor.tensors, {**anchor.meta, "classes_sha256": "0" * 64}, "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors: got a head for classes 0000"):
        dataset.check_classes(other)
