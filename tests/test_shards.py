"""Shards: bytes that repeat, examples that come back pixel for pixel, damage that is named."""

import io
import tarfile

import numpy as np
import pytest
from conftest import make_split
from PIL import Image

from modelstock.errors import DataError, WeightsError
from modelstock.params import load_params
from modelstock.preparation import drawn, prepare, reference_model
from modelstock.shapes import SPLITS, draw
from modelstock.shards import check_classes, load_manifest, read_all, read_batches
from modelstock.weights import WeightSet


def test_the_same_examples_give_the_same_bytes(tmp_path):
    make_split(tmp_path / "a", "shapes", 120)
    make_split(tmp_path / "b", "shapes", 120)
    names = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert names == ["000000.tar", "000001.tar", "000002.tar", "manifest.json"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_images_and_labels_come_back_in_order_and_exact(tmp_path):
    make_split(tmp_path, "shapes-objectnet", 110)
    images, labels, manifest = read_all(tmp_path)
    expected, truth = draw("shapes-objectnet", range(110), seed=3)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(labels, truth)
    assert manifest.label_groups[manifest.labels.index("wheel")] == [manifest.classes.index(c) for c in
                                                                     ("disc", "ring", "gear")]  # fmt: skip


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
        load_manifest(tmp_path)


def test_a_folder_without_or_with_a_wrong_manifest_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"manifest\.json: got No such file"):
        load_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"benchmark": 3}')
    with pytest.raises(DataError, match=r"benchmark: .*; role: Field required"):
        load_manifest(tmp_path)


def test_an_example_without_an_image_or_with_a_wild_label_is_refused(tmp_path):
    manifest = make_split(tmp_path, "shapes", 10)
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        entry = tarfile.TarInfo("x.cls")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"99"))
    with pytest.raises(DataError, match="example x: got label 99, no image"):
        list(read_batches(tmp_path, manifest, batch_size=4))


def test_a_head_for_other_classes_is_refused(tmp_path, anchor):
    manifest = make_split(tmp_path, "shapes", 10)
    check_classes(anchor, manifest, tmp_path)
    other = WeightSet(anchor.tensors, {**anchor.meta, "classes_sha256": "0" * 64}, "other.safetensors")
    with pytest.raises(WeightsError, match=r"other\.safetensors: got a head for classes 0000"):
        check_classes(other, manifest, tmp_path)


@pytest.fixture
def small():
    sizes = dict.fromkeys(load_params().prepare.images, 36)
    return load_params().prepare.model_copy(update={"images": sizes, "reference_draws": 600, "reference_epochs": 1})


def test_preparing_a_split_writes_shards_and_a_picture_of_it(tmp_path, small):
    manifest = prepare("shapes-sketch", small, tmp_path)
    assert (manifest.count, manifest.role) == (36, "shift")
    with Image.open(tmp_path / "contact.png") as sheet:
        assert sheet.size == (12 * 64, 3 * 64)


def test_the_adversarial_split_holds_what_the_reference_model_gets_wrong(tmp_path, small):
    import torch

    from modelstock.models import TINY_PREPROCESS, normalise

    prepare("shapes-adversarial", small, tmp_path)
    images, labels, manifest = read_all(tmp_path)
    reference = reference_model(small)
    with torch.inference_mode():
        logits = reference(normalise(images, TINY_PREPROCESS))
    guess = logits[:, [g[0] for g in manifest.label_groups]].argmax(dim=1).numpy()
    assert (guess != labels).all()
    assert np.bincount(labels).tolist() == [3] * 12


def test_an_unknown_split_is_refused_with_the_known_ones(tmp_path, small):
    with pytest.raises(DataError, match="got 'imagenet'; expected train, held-out"):
        prepare("imagenet", small, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_draws_go_on_without_end_and_without_repeating():
    source = drawn("train", seed=1)
    first = [next(source)[0].tobytes() for _ in range(600)]
    assert len(set(first)) == 600
    assert len(SPLITS["train"].labels) == 24
