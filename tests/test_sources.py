"""Data sets as they are published: every layout, in every container, gives the images and labels it should."""

import hashlib
import io
import json
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from modelstock.data.classes import wnids
from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.layouts import LAYOUTS, Layout, Meaning
from modelstock.data.preparation import prepare
from modelstock.errors import DataError, ParamsError
from modelstock.params import ClassesParams
from tests.support import layouts
from tests.support.layouts import IMAGENET, examples, folder, imagenet_train, packed, picture, settings, tar

PETS = ClassesParams(names={"c0": "cat", "d0": "dog", "o0": "owl"}, templates=["a {}"])
FILES = {f"{f}/{i}{f}.jpg": picture(100 * k + i) for k, f in enumerate(("c0", "d0", "o0")) for i in range(4)}


def prepared(tmp_path, path, classes=PETS, *, out="out", name="test", **given):
    params = settings(path, name=name, **given)
    return prepare(name, params, classes, tmp_path / out, scratch=tmp_path / "scratch")


def refused(tmp_path, match, path, classes=PETS, **given):
    """Refused with this message, and nothing is written."""
    with pytest.raises(DataError, match=match) as caught:
        prepared(tmp_path, path, classes, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip"])
@pytest.mark.parametrize("top", ["", "pets/", "a/b/"])
def test_every_container_gives_the_same_shards_with_the_files_own_bytes(tmp_path, kind, top):
    shuffled = dict(sorted(FILES.items(), key=lambda item: hashlib.sha256(item[1]).digest()))
    path = packed(kind, {top + name: content for name, content in shuffled.items()}, tmp_path)
    manifest = prepared(tmp_path, path, shard_size=5)
    expected = [(f"{n:08d}", n // 4, "jpg", content) for n, content in enumerate(FILES.values())]
    assert examples(tmp_path / "out", manifest) == expected
    assert manifest == open_dataset(tmp_path / "out").manifest
    assert [s.count for s in manifest.shards] == [5, 5, 2]
    assert (manifest.labels, manifest.classes) == (["cat", "dog", "owl"], ["cat", "dog", "owl"])
    assert manifest.label_groups == [[0], [1], [2]]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_files_below_a_class_folder_are_its_own_and_the_source_may_be_a_link(tmp_path):
    folder(tmp_path / "there", {name.replace("/", "/deep/er/"): content for name, content in FILES.items()})
    (tmp_path / "here").symlink_to("there")
    assert prepared(tmp_path, tmp_path / "here").count == 12


def test_class_order_is_that_of_the_head_and_not_of_names(tmp_path):
    path = packed("folder", FILES, tmp_path)
    manifest = prepared(tmp_path, path, ClassesParams(names=["o0", "c0", "d0"], templates=["{}"]))
    found = [content for _, label, _, content in examples(tmp_path / "out", manifest) if label == 0]
    assert found == [FILES[f"o0/{i}o0.jpg"] for i in range(4)]


def test_a_test_set_may_have_some_of_the_classes_and_a_training_set_may_not(tmp_path):
    path = packed("tar", {n: c for n, c in FILES.items() if not n.startswith("d0")}, tmp_path)
    manifest = prepared(tmp_path, path)
    assert (manifest.labels, manifest.label_groups) == (["cat", "owl"], [[0], [2]])
    assert Counter(label for _, label, _, _ in examples(tmp_path / "out", manifest)) == {0: 4, 1: 4}
    with pytest.raises(DataError, match="got 2 of 3 class folders, d0 without images; expected the 3 class folders"):
        prepared(tmp_path, path, name="train", out="train")


def test_missing_and_unexpected_folders_are_one_error_that_counts_and_names_them(tmp_path):
    files = {n: c for n, c in imagenet_train().items() if n[:9] not in wnids()[:5]} | {"extra/a.jpg": picture(1)}
    place = packed("folder", files, tmp_path)
    refused(
        tmp_path,
        r"995 of 1000 class folders, n01440764, n01443537, n01484850 and 2 more without images, "
        r"1 images in extra; expected",
        place,
        IMAGENET,
        labels="imagenet",
    )


def test_what_is_no_image_is_counted_or_refused(tmp_path):
    junk = {"c0/.DS_Store": b"", "c0/notes.txt": b"", "Thumbs.db": b"", "__MACOSX/c0/._0.jpg": b"", "README": b""}
    path = packed("zip", FILES | junk, tmp_path)
    assert prepared(tmp_path, path).left_out == {"files that are not images": 5}
    folder(tmp_path / "other", FILES | {"d0/movie.mp4": b""})
    with pytest.raises(DataError, match=r"got d0/movie\.mp4, no images by their names; expected \.bmp \.gif"):
        prepared(tmp_path, tmp_path / "other")


def test_two_sets_in_one_folder_are_refused(tmp_path):
    path = folder(tmp_path / "all", {f"{s}/{n}": c for n, c in FILES.items() for s in ("train", "val")})
    refused(tmp_path, "got class folders in train, val; expected one folder of class folders", path)


def cut_between_members(path: Path) -> None:
    """What tarfile itself takes for a whole archive of five files."""
    with tarfile.open(tar(path, FILES)) as archive:
        sixth = archive.getmembers()[5].offset
    path.write_bytes(path.read_bytes()[:sixth])
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "got nothing there; expected a folder, a .tar"),
        (lambda p: p.write_bytes(b"\xfd7zXZ\x00" + bytes(600)), r"got a file that begins with b'\\xfd7zX'"),
        (lambda p: p.mkdir(), "got 0 of 3 class folders, c0, d0, o0 without images"),
        (lambda p: tar(p, FILES) and p.write_bytes(p.read_bytes()[:7000]), "damaged archive"),
        (lambda p: cut_between_members(p), "got an archive that ends early; expected a whole one"),
        (lambda p: tar(p, FILES, "w:gz") and p.write_bytes(p.read_bytes()[:-20]), "damaged archive"),
        (lambda p: p.write_bytes(b"PK\3\4" + bytes(99)), "damaged archive"),
    ],
)
def test_what_is_no_source_is_named(tmp_path, make, message):
    make(tmp_path / "source")
    refused(tmp_path, message, tmp_path / "source")


# ImageNet and the sets of its classes


@pytest.fixture(scope="module")
def train():
    return imagenet_train(2)


def test_imagenet_train_is_read_from_the_archive_of_archives(tmp_path, train):
    path = layouts.nested(tmp_path / "ILSVRC2012_img_train.tar", train)
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest = prepared(tmp_path, path, IMAGENET, labels="imagenet", name="train", shard_size=999)
    found = examples(tmp_path / "out", manifest)
    assert [(label, content) for _, label, _, content in found] == [
        (wnids().index(name[:9]), train[name]) for name in sorted(train)
    ]
    assert (manifest.role, len(manifest.labels), manifest.count) == ("train", 1000, 2000)
    assert manifest.label_groups == [[i] for i in range(1000)]
    assert len(set(manifest.labels)) == 1000  # two pairs of ImageNet's names are the same words
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ILSVRC2012_img_train.tar", "out", "scratch"]
    # The same from a folder of the thousand archives, and from a folder.
    with tarfile.open(path) as outer:
        outer.extractall(tmp_path / "archives", filter="data")
    folder(tmp_path / "train", train)
    for number, place in enumerate(("archives", "train")):
        again = prepared(
            tmp_path, tmp_path / place, IMAGENET, labels="imagenet", name="train", shard_size=999, out=f"again{number}"
        )
        assert again == manifest


def test_the_flat_validation_set_has_the_labels_of_the_development_kit(tmp_path):
    random = np.random.default_rng(3)
    order = random.permutation(wnids()).tolist()  # the kit's IDs do not follow the order of WordNet ids
    truth = random.permutation(wnids()).tolist()
    flat = {f"ILSVRC2012_val_{i:08d}.JPEG": picture(i) for i in range(1, 1001)}
    kit = layouts.devkit(tmp_path / "ILSVRC2012_devkit_t12.tar.gz", truth, order)
    layouts.devkit(tmp_path / "kit/x", truth, order)
    sorted_out = folder(tmp_path / "val", {f"{truth[i - 1]}/{name}": flat[name] for i, name in enumerate(flat, 1)})
    expected = prepared(tmp_path, sorted_out, IMAGENET, labels="imagenet")
    sources = [packed("tar", flat, tmp_path), packed("tar.gz", flat, tmp_path), folder(tmp_path / "flat", flat)]
    for number, path in enumerate(sources):
        given = kit if number else tmp_path / "kit/ILSVRC2012_devkit_t12"
        got = prepared(tmp_path, path, IMAGENET, labels="imagenet", devkit=str(given), out=f"out{number}")
        assert got == expected
    first = next(e for e in examples(tmp_path / "out0", expected) if e[3] == flat["ILSVRC2012_val_00000001.JPEG"])
    assert wnids()[first[1]] == truth[0]
    with pytest.raises(DataError, match=r"without class folders; expected labels for them; name ILSVRC2012_devkit_t12"):
        prepared(tmp_path, sources[0], IMAGENET, labels="imagenet", out="no")
    with pytest.raises(DataError, match=r"got no development kit .*; expected ILSVRC2012_devkit_t12\.tar\.gz"):
        prepared(tmp_path, sources[0], IMAGENET, labels="imagenet", devkit=str(sorted_out), out="no")
    (tmp_path / "flat/ILSVRC2012_val_00000500.JPEG").unlink()
    with pytest.raises(DataError, match="got 999 images, numbers 1 to 1000; expected 1000, one a line"):
        prepared(tmp_path, sources[2], IMAGENET, labels="imagenet", devkit=str(kit), out="no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["folder", "tar.gz"])
def test_imagenet_v2_folders_are_the_labels_themselves(tmp_path, kind):
    top = "imagenetv2-matched-frequency-format-val"
    files = {f"{top}/{i}/{i}ab.jpeg": picture(i) for i in sorted(range(1000), key=str)}
    manifest = prepared(tmp_path, packed(kind, files, tmp_path), IMAGENET, labels="imagenet-v2")
    found = examples(tmp_path / "out", manifest)
    assert [content for *_, content in found] == [picture(i) for i in range(1000)]  # 10 comes after 9
    assert [label for _, label, _, _ in found] == list(range(1000))
    assert manifest.label_groups[10] == [10]


@pytest.mark.parametrize("labels", ["imagenet-r", "imagenet-a"])
def test_the_sets_of_200_classes_point_into_the_1000(tmp_path, labels):
    own = wnids(labels)
    files = {f"{labels}/{w}/art_0.jpg": picture(i) for i, w in enumerate(own)} | {f"{labels}/README.txt": b"cite us"}
    manifest = prepared(tmp_path, packed("tar", files, tmp_path), IMAGENET, labels=labels)
    assert [wnids()[g] for (g,) in manifest.label_groups] == own
    assert [content for *_, content in examples(tmp_path / "out", manifest)] == [picture(i) for i in range(200)]
    assert len(manifest.classes) == 1000
    assert manifest.labels[0] == manifest.classes[wnids().index(own[0])]
    lacking = packed("zip", {n: c for n, c in files.items() if own[7] not in n}, tmp_path)
    with pytest.raises(DataError, match=f"got 199 of 200 class folders, {own[7]} without images"):
        prepared(tmp_path, lacking, IMAGENET, labels=labels, out="lacking")


def test_imagenet_sketch_in_its_zip(tmp_path):
    files = {f"sketch/{w}/sketch_1.JPEG": picture(i) for i, w in enumerate(wnids())}
    manifest = prepared(tmp_path, packed("zip", files, tmp_path), IMAGENET, labels="imagenet-sketch")
    assert [(label, c) for _, label, _, c in examples(tmp_path / "out", manifest)] == [
        (i, picture(i)) for i in range(1000)
    ]


def test_a_layout_of_imagenet_needs_its_classes(tmp_path):
    refused(
        tmp_path,
        "labels: imagenet-r: got 3 classes of another kind; expected classes.names: imagenet",
        packed("folder", FILES, tmp_path),
        labels="imagenet-r",
    )


# ObjectNet


def test_objectnet_maps_folders_to_classes_many_to_one_and_leaves_the_others_out(tmp_path):
    files = layouts.objectnet()
    path = layouts.encrypted_zip(tmp_path / "objectnet-1.0.zip", files, b"objectnetisatestset")
    manifest = prepared(tmp_path, path, IMAGENET, labels="objectnet", password="objectnetisatestset")
    assert manifest.labels == ["Alarm clock", "Bench", "T-shirt"]  # in the order of folder names
    assert manifest.label_groups == [[409, 530], [703], [610]]
    assert manifest.left_out == {
        "files that are not images": 4,
        "folders without a class": 1,
        "images in folders without a class": 2,
    }
    assert manifest.border == 2
    found = examples(tmp_path / "out", manifest)
    assert [(label, suffix, c) for _, label, suffix, c in found] == [
        (label, "png", files[f"objectnet-1.0/images/{f}/{i}{f}.png"])
        for label, f in enumerate(("alarm_clock", "bench", "t-shirt"))
        for i in range(2)
    ]
    # Files stay as they are, and readers cut the border.
    images, _ = read_all(open_dataset(tmp_path / "out"))
    from PIL import Image

    with Image.open(io.BytesIO(found[0][3])) as image:
        np.testing.assert_array_equal(images[0], np.asarray(image)[2:-2, 2:-2])
    # The same from the unpacked folder, named at any depth, with mappings in it, beside it or elsewhere.
    folder(tmp_path / "unpacked", files)
    (tmp_path / "moved").mkdir()
    moved = {"mappings": str(tmp_path / "moved/m")}
    tops = [("", {}), ("objectnet-1.0", {}), ("objectnet-1.0/images", {}), ("objectnet-1.0/images", moved)]
    for number, (top, given) in enumerate(tops):
        if given:
            (tmp_path / "unpacked/objectnet-1.0/mappings").rename(tmp_path / "moved/m")
        again = prepared(tmp_path, tmp_path / "unpacked" / top, IMAGENET, labels="objectnet", out=f"o{number}", **given)
        assert again.sha256 == manifest.sha256
    with pytest.raises(DataError, match=r"got no folder_to_objectnet_label\.json.*; name it as `mappings`"):
        prepared(tmp_path, tmp_path / "unpacked", IMAGENET, labels="objectnet", out="no")


def test_a_password_that_is_missing_or_wrong_is_said_at_once(tmp_path):
    path = layouts.encrypted_zip(tmp_path / "a.zip", FILES, b"right")
    refused(tmp_path, "got an encrypted archive; expected its password", path)
    refused(tmp_path, "got a password that does not open it", path, password="wrong")
    assert prepared(tmp_path, path, password="right").count == 12


def test_objectnet_with_a_folder_or_a_mapping_too_few_is_refused(tmp_path):
    files = layouts.objectnet()
    lacking = {n: c for n, c in files.items() if "/bench/" not in n}
    refused(
        tmp_path,
        "got 2 of 3 class folders, bench without images",
        packed("zip", lacking, tmp_path),
        IMAGENET,
        labels="objectnet",
    )
    files["objectnet-1.0/mappings/objectnet_to_imagenet_1k.json"] = json.dumps({"Bench": "a pew"}).encode()
    refused(
        tmp_path,
        "mappings that do not fit together .*a pew",
        packed("tar", files, tmp_path),
        IMAGENET,
        labels="objectnet",
    )


# The held-out split


@pytest.mark.parametrize("kind", ["folder", "tar.gz", "nested"])
def test_the_held_out_cut_is_the_same_in_every_container_and_disjoint(tmp_path, kind):
    files = {f"{f}/{f}_{i}.jpg": picture(1000 * k + i) for k, f in enumerate(("c0", "d0", "o0")) for i in range(9)}
    path = layouts.nested(tmp_path / "a.tar", files) if kind == "nested" else packed(kind, files, tmp_path)
    parts = {}
    for part in ("train", "held-out"):
        manifest = prepared(tmp_path, path, part=part, name=part, out=part, held_out_per_class=4)
        parts[part] = {c: label for _, label, _, c in examples(tmp_path / part, manifest)}
    # By hand for one class: the smallest four of sha256 over <class folder>/<file name>.
    order = sorted((f"d0/d0_{i}.jpg" for i in range(9)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert {c for c, label in parts["held-out"].items() if label == 1} == {files[name] for name in order[:4]}
    assert [name[6] for name in order[:4]] == ["4", "2", "8", "7"]
    assert not parts["train"].keys() & parts["held-out"].keys()
    assert parts["train"].keys() | parts["held-out"].keys() == set(files.values())
    assert Counter(parts["held-out"].values()) == {0: 4, 1: 4, 2: 4}


def test_a_class_too_small_for_the_cut_is_refused(tmp_path):
    path = packed("folder", FILES, tmp_path)
    refused(
        tmp_path,
        "got 4 images of c0 and 3 such classes; expected more than prepare.held_out_per_class, 4",
        path,
        part="train",
        name="train",
        held_out_per_class=4,
    )
    assert prepared(tmp_path, path, part="train", name="train", held_out_per_class=3).count == 3


# Shards that exist, and folders of the library datasets


def wds(place: Path, labels: list[int], per_shard: int = 3, kind: str = "jpeg", suffix: str = "jpg") -> Path:
    """Shards as the CLIP benchmark publishes them: 0.tar, 1.tar, ..., of s0000000.jpg and s0000000.cls."""
    for number, start in enumerate(range(0, len(labels), per_shard)):
        members = {}
        for i in range(start, min(start + per_shard, len(labels))):
            members |= {f"s{i:07d}.cls": str(labels[i]).encode(), f"s{i:07d}.{suffix}": picture(i, kind)}
        tar(place / f"{number}.tar", members)
    return place


def test_webdataset_shards_are_used_where_they_are(tmp_path):
    path = wds(tmp_path / "wds/test", [2, 0, 1, 1, 0, 2, 2])
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()}
    manifest = prepared(tmp_path, path, workers=2)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in path.iterdir()} == before
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["contact.png", "manifest.json"]
    assert manifest.root == str(path)
    assert [(s.name, s.count) for s in manifest.shards] == [("0.tar", 3), ("1.tar", 3), ("2.tar", 1)]
    assert [s.sha256 for s in manifest.shards] == [hashlib.sha256(before[f"{i}.tar"][0]).hexdigest() for i in range(3)]
    images, labels = read_all(open_dataset(tmp_path / "out"))
    assert labels.tolist() == [2, 0, 1, 1, 0, 2, 2]
    assert images.shape == (7, 8, 8, 3)
    (path / "1.tar").write_bytes(before["1.tar"][0] + b" ")
    with pytest.raises(DataError, match=r"wds/test/1\.tar: got sha256"):
        open_dataset(tmp_path / "out")


@pytest.mark.parametrize(("labels", "count"), [("imagenet-r", 200), ("imagenet-a", 200), ("imagenet-v2", 1000)])
def test_integers_of_shards_count_the_classes_of_their_layout(tmp_path, labels, count):
    path = wds(tmp_path / "wds", list(range(count)), 500, "webp", "webp")
    manifest = prepared(tmp_path, path, IMAGENET, labels=labels)
    own = wnids(labels) if count == 200 else wnids()
    assert [wnids()[g] for (g,) in manifest.label_groups] == own


def test_objectnets_shards_need_the_mappings_and_have_the_border(tmp_path):
    path = wds(tmp_path / "wds", [0, 1, 2], kind="png", suffix="png")
    refused(tmp_path, "name it as `mappings`", path, IMAGENET, labels="objectnet")
    folder(tmp_path, {n: c for n, c in layouts.objectnet().items() if "mappings" in n})
    manifest = prepared(tmp_path, path, IMAGENET, labels="objectnet", mappings=str(tmp_path / "objectnet-1.0/mappings"))
    assert (manifest.label_groups, manifest.border) == ([[409, 530], [703], [610]], 2)
    assert read_all(open_dataset(tmp_path / "out"))[0].shape == (3, 4, 4, 3)


def test_shards_are_copied_where_only_a_part_of_them_is_wanted(tmp_path):
    path = wds(tmp_path / "wds", [0, 1, 2] * 4)
    found = []
    for part in ("train", "held-out"):
        manifest = prepared(tmp_path, path, part=part, name=part, out=part, held_out_per_class=1)
        assert manifest.root is None
        found += [(c, label) for _, label, _, c in examples(tmp_path / part, manifest)]
    assert len(found) == 12
    assert dict(found) == {picture(i): i % 3 for i in range(12)}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": picture(1), "a.cls": b"3"}, "with label 3; expected an image and a label from 0 to 2"),
        ({"a.jpg": picture(1), "b.cls": b"0"}, "2 examples such as 0/a, an image with label None"),
        ({"a.jpg": picture(1), "a.cls": b"cat"}, "with label cat"),
        ({"a.jpg": picture(1), "a.png": picture(1), "a.cls": b"0"}, "two images 0/a"),
        (
            {"a.jpg": picture(1)[:-40], "a.cls": b"0"},
            "1 unreadable images of 1: c0/0/a .*expected at most 0; leave them",
        ),
    ],
)
def test_bad_shards_are_refused(tmp_path, members, message):
    tar(tmp_path / "wds/0.tar", members)
    refused(tmp_path, message, tmp_path / "wds")


def test_a_folder_of_the_library_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["owl", "cat", "dog"]  # of another order than the head's
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names), "id": datasets.Value("string")}
    features = datasets.Features(kinds)
    images = [{"bytes": picture(i, "png"), "path": None} for i in range(6)]
    rows = {"image": images, "label": [0, 1, 2] * 2, "id": list("abcdef")}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    manifest = prepared(tmp_path, tmp_path / "rows", workers=2, shard_size=4)
    assert [(label, suffix, c) for _, label, suffix, c in examples(tmp_path / "out", manifest)] == [
        (label, "png", picture(i, "png")) for label, i in [(0, 1), (0, 4), (1, 2), (1, 5), (2, 0), (2, 3)]
    ]
    datasets.DatasetDict({"test": datasets.Dataset.from_dict(rows, features=features)}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match="got several splits of the library datasets; expected one"):
        prepared(tmp_path, tmp_path / "both")
    other = ClassesParams(names=["owl", "cat"], templates=["{}"])
    with pytest.raises(DataError, match="got 3 labels such as dog; expected names or folders of the 2"):
        prepared(tmp_path, tmp_path / "rows", other)


def test_without_the_library_its_folder_names_the_extra(tmp_path, monkeypatch):
    folder(tmp_path / "rows", {"dataset_info.json": b"{}", "state.json": b"{}"})
    monkeypatch.setattr("modelstock.data.containers.find_spec", lambda name: None)
    refused(tmp_path, r"which is not installed; expected modelstock\[datasets\]", tmp_path / "rows")


# What is refused


def odd_tar(path: Path, name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Path:
    tar(path, FILES)
    with tarfile.open(path, "a") as archive:
        entry = tarfile.TarInfo(name)
        entry.type, entry.linkname = kind, link
        archive.addfile(entry)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("../evil.jpg", tarfile.REGTYPE, r"member '\.\./evil\.jpg': got a path that leads out"),
        ("c0/../../evil.jpg", tarfile.REGTYPE, "leads out"),
        ("/etc/evil.jpg", tarfile.REGTYPE, "leads out"),
        ("c0/link.jpg", tarfile.SYMTYPE, r"member c0/link\.jpg: got a link, device or sparse file"),
        ("c0/hard.jpg", tarfile.LNKTYPE, "got a link"),
        ("c0/null.jpg", tarfile.CHRTYPE, "device"),
    ],
)
def test_members_that_lead_elsewhere_are_refused(tmp_path, name, kind, message):
    path = odd_tar(tmp_path / "a.tar", name, kind, "c0/0c0.jpg")
    refused(tmp_path, message, path)
    import gzip

    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    refused(tmp_path, message, tmp_path / "a.tar.gz")


def test_the_same_in_zip_archives(tmp_path):
    refused(tmp_path, "leads out", packed("zip", FILES | {"../evil.jpg": b""}, tmp_path))
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        entry = zipfile.ZipInfo("c0/link.jpg")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "../../etc/passwd")
    refused(tmp_path, r"member c0/link\.jpg: got a link", tmp_path / "link.zip")


def test_a_link_out_of_a_folder_is_refused_and_one_within_is_followed(tmp_path):
    path = folder(tmp_path / "pets", FILES)
    (path / "c0/again.jpg").symlink_to("0c0.jpg")
    assert prepared(tmp_path, path, out="within").count == 13
    (tmp_path / "secret.jpg").write_bytes(picture(7))
    (path / "c0/x.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=r"link c0/x\.jpg: got a link to .*secret\.jpg; expected links to files"):
        prepared(tmp_path, path)
    (path / "c0/x.jpg").unlink()
    (path / "c0/loop").symlink_to("..")
    with pytest.raises(DataError, match="link c0/loop"):
        prepared(tmp_path, path)
    assert not (tmp_path / "out").exists()


def test_bombs_are_refused_before_they_are_unpacked(tmp_path, monkeypatch):
    refused(
        tmp_path,
        "member c0/bomb.jpg: got 68157440 bytes out of .*; expected at most 100 times",
        packed("zip", FILES | {"c0/bomb.jpg": bytes(65 << 20)}, tmp_path),
    )
    monkeypatch.setattr("modelstock.data.containers.FLOOR", 10**6)
    refused(
        tmp_path,
        "got 1[0-9]{6} bytes and more out of .*; expected at most 100 times",
        packed("tar.gz", FILES | {f"c0/bomb{i}.jpg": bytes(400_000) for i in range(3)}, tmp_path),
    )
    monkeypatch.setattr("modelstock.data.containers.LIMIT", 5000)
    noise = {"c0/large.jpg": np.random.default_rng(0).bytes(5001)}
    for kind in ("zip", "tar", "tar.gz", "folder"):
        refused(tmp_path, r"c0/large\.jpg: got 5001 bytes; expected at most", packed(kind, FILES | noise, tmp_path))


def test_a_size_that_an_archive_lies_about_reads_no_more_than_that(tmp_path):
    path = packed("zip", FILES | {"c0/liar.jpg": np.random.default_rng(0).bytes(50_000)}, tmp_path)
    content = path.read_bytes()
    true = (50_000).to_bytes(4, "little")
    assert content.count(true) >= 2
    path.write_bytes(content.replace(true, (600).to_bytes(4, "little")))
    manifest = prepared(tmp_path, path, unreadable=0.5)
    assert manifest.unreadable == ["c0/liar.jpg"]


def test_a_third_level_of_archives_is_refused(tmp_path):
    deep = tar(tmp_path / "deep.tar", {"a.jpg": picture(0)}).read_bytes()
    middle = tar(tmp_path / "middle.tar", {"deep.tar": deep}).read_bytes()
    refused(tmp_path, r"c0\.tar/deep\.tar: got a third level", tar(tmp_path / "a/outer.tar", {"c0.tar": middle}))


def test_a_layout_is_one_entry(tmp_path, monkeypatch):
    """A set whose folders are numbered backwards, with an eraser's border."""

    def backwards(head, place, mappings):
        labels = range(len(head.names))
        return Meaning({str(-label % 3): label for label in labels}, head.names, [[i] for i in labels], border=1)

    monkeypatch.setitem(LAYOUTS, "backwards", Layout(title="Backwards", meaning=backwards, imagenet=False))
    numbered = {"c0": "0", "d0": "2", "o0": "1"}
    path = packed("tar", {f"{numbered[n[:2]]}/{n[3:]}": content for n, content in FILES.items()}, tmp_path)
    manifest = prepared(tmp_path, path, labels="backwards")
    assert (manifest.labels, manifest.border) == (["cat", "dog", "owl"], 1)
    assert [(label, content) for _, label, _, content in examples(tmp_path / "out", manifest)] == [
        (n // 4, content) for n, content in enumerate(FILES.values())
    ]


def test_an_unknown_layout_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ParamsError, match=r"labels: got 'imagenet-v3'; expected classes, imagenet, .*imagenet-v2\?"):
        prepared(tmp_path, tmp_path / "nothing here", labels="imagenet-v3")
    assert list(tmp_path.iterdir()) == []
