"""An archive gives what a folder of the same files gives, all of it, or is refused with the file's name."""

import gzip
import io
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.index import index_shards
from modelstock.data.manifest import Shard, make_manifest
from modelstock.data.preparation import prepare
from modelstock.errors import DataError
from modelstock.files import sha256_of
from modelstock.params import ClassesParams
from tests.support import layouts
from tests.support.layouts import IMAGENET, folder, imagenet_train, packed, picture, settings, tar

PETS = ClassesParams(names={"c0": "cat", "d0": "dog", "o0": "owl"}, templates=["a {}"])
FILES = {f"{f}/{i}{f}.jpg": picture(100 * k + i) for k, f in enumerate(("c0", "d0", "o0")) for i in range(4)}
FIRST, SECOND = dict(list(FILES.items())[:6]), dict(list(FILES.items())[6:])


def prepared(tmp_path, path, classes=PETS, *, out="out", name="test", **given):
    params = settings(path, name=name, **given)
    return prepare(name, params, classes, tmp_path / out, scratch=tmp_path / "scratch")


def refused(tmp_path, match, path, classes=PETS, **given):
    """Refused in one line with this message, and nothing is written."""
    with pytest.raises(DataError, match=match) as caught:
        prepared(tmp_path, path, classes, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "scratch").exists()


# Archives beside folders


@pytest.mark.parametrize("name", ["backup.tar", "BACKUP.TAR"])
def test_a_left_over_archive_beside_class_folders_is_no_data_set_and_is_named(tmp_path, name):
    path = folder(tmp_path / "photos", FILES)
    tar(path / name, {"c0/old.jpg": picture(9000)})
    if name.islower():
        refused(tmp_path, r"1 archives such as backup\.tar beside c0/0c0\.jpg, .*; move one of them elsewhere", path)
    else:
        assert prepared(tmp_path, path).notices == ["left out: 1 files that are not images"]


@pytest.mark.parametrize("other", ["more.tar.gz", "more.zip", "below/1.tar", "a.jpg"])
def test_archives_of_which_only_some_would_be_read_are_refused(tmp_path, other):
    tar(tmp_path / "set/0.tar", FIRST)
    (tmp_path / "set" / other).parent.mkdir(exist_ok=True)
    (tmp_path / "set" / other).write_bytes(b"whatever")
    refused(tmp_path, f"1 archives such as 0.tar beside {other}; expected either archives or images", tmp_path / "set")


def test_what_tools_leave_beside_shards_does_no_harm(tmp_path):
    tar(tmp_path / "set/c0.tar", {n[3:]: c for n, c in FILES.items() if n.startswith("c0")})
    folder(tmp_path / "set", {"c0.parquet": b"", "c0_stats.json": b"{}", "mappings/a.json": b"{}", ".hidden.jpg": b""})
    (tmp_path / "set/empty.tar").mkdir()
    assert prepared(tmp_path, tmp_path / "set").count == 4


# Joined archives, and what follows an end


def joined_zip(path: Path) -> Path:
    first, second = packed("zip", FIRST, path.parent / "1"), packed("zip", SECOND, path.parent / "2")
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with zipfile.ZipFile(path) as archive:
        assert len(archive.namelist()) == 6  # what zipfile sees of twelve
    return path


def joined_tar(path: Path) -> Path:
    first, second = tar(path.parent / "1.tar", FIRST), tar(path.parent / "2.tar", SECOND)
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 6  # what tarfile sees of twelve
    return path


def joined_tar_gz(path: Path) -> Path:
    first, second = tar(path.parent / "1.tgz", FIRST, "w:gz"), tar(path.parent / "2.tgz", SECOND, "w:gz")
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


def joined_in_an_archive(path: Path) -> Path:
    """An archive of archives, one of which is two."""
    inner = joined_tar(path.parent / "inner.tar")
    return tar(path, {"a.tar": inner.read_bytes(), "b.tar": tar(path.parent / "b.tar", {}).read_bytes()})


def with_something_behind(kind: str):
    def make(path: Path) -> Path:
        found = packed(kind, FILES, path.parent / "made")
        path.write_bytes(found.read_bytes() + b"something")
        return path

    return make


JOINED = {
    "tar": (joined_tar, "data after the end of the archive, as where archives were joined"),
    "tar.gz": (joined_tar_gz, "data after the end of the archive, as where archives were joined"),
    "tar in tar": (joined_in_an_archive, r"a\.tar: got data after the end of the archive"),
    "zip": (joined_zip, "data before its first member, as where archives were joined"),
    "tar and something": (with_something_behind("tar"), "data after the end of the archive"),
    "tar.gz and something": (with_something_behind("tar.gz"), "damage"),
    "zip and something": (with_something_behind("zip"), "data after its end"),
}


@pytest.mark.parametrize("kind", JOINED)
def test_archives_that_were_joined_are_never_taken_for_one_of_them(tmp_path, kind):
    make, message = JOINED[kind]
    (tmp_path / "source").mkdir()
    refused(tmp_path, message, make(tmp_path / "source/joined"))


def test_padding_and_several_gzip_members_of_one_archive_are_usual(tmp_path):
    plain = tar(tmp_path / "a.tar", FILES).read_bytes()
    (tmp_path / "padded.tar").write_bytes(plain + bytes(1 << 20))
    (tmp_path / "pigz.tar.gz").write_bytes(gzip.compress(plain[:5000]) + gzip.compress(plain[5000:]))
    for name in ("padded.tar", "pigz.tar.gz"):
        assert prepared(tmp_path, tmp_path / name, out=f"of-{name}").count == 12


def test_a_zip_archive_with_a_comment_is_whole(tmp_path):
    path = packed("zip", FILES, tmp_path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"cite us: PK, 22 bytes or more"
    assert prepared(tmp_path, path).count == 12


def test_a_damaged_head_before_a_block_of_zeros_is_no_end(tmp_path):
    """tarfile takes it for one; the black image behind it would hide the rest."""
    black = tar(tmp_path / "b.tar", {**FIRST, "d0/black.ppm": b"\0" * 4096, **SECOND})
    with tarfile.open(black) as archive:
        head = archive.getmember("d0/black.ppm").offset
    content = bytearray(black.read_bytes())
    content[head + 5] ^= 1
    black.write_bytes(content)
    with tarfile.open(black) as archive:
        assert len(archive.getnames()) == 6
    refused(tmp_path, "an archive that ends early", black)


# Things that come twice


def again(kind: str, path: Path, name: str) -> Path:
    """The files, and one of them appended again as another image, as `tar -r` and `zip` do."""
    found = packed(kind, FILES, path)
    if kind == "zip":
        with zipfile.ZipFile(found, "a") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zipfile gives one for a name that is there already
            archive.writestr(name, picture(999))
        return found
    with tarfile.open(found, "a") as archive:
        entry = tarfile.TarInfo(name)
        entry.size = len(picture(999))
        archive.addfile(entry, io.BytesIO(picture(999)))
    if kind == "tar.gz":
        found.write_bytes(gzip.compress(found.read_bytes()))
    return found


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", ["c0/0c0.jpg", "./c0/0c0.jpg", "c0//0c0.jpg", "c0/./0c0.jpg"])
def test_a_member_that_comes_twice_by_whatever_spelling_is_refused(tmp_path, kind, name):
    path = again(kind, tmp_path, name)
    refused(tmp_path, r"1 paths that come more than once, such as c0/0c0\.jpg; .*unpack it, which keeps the last", path)


def test_a_class_that_comes_twice_in_an_archive_of_archives_is_refused(tmp_path):
    inner = tar(tmp_path / "c0.tar", {"0.jpg": picture(1)}).read_bytes()
    path = tar(tmp_path / "a/all.tar", {"c0.tar": inner, "d0.tar": inner})
    with tarfile.open(path, "a") as archive:
        entry = tarfile.TarInfo("c0.tar")
        entry.size = len(inner)
        archive.addfile(entry, io.BytesIO(inner))
    refused(tmp_path, r"1 paths that come more than once, such as c0/0\.jpg", path)


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_names_that_differ_in_case_alone_are_two_images_in_every_container(tmp_path, kind):
    path = packed(kind, FILES | {"c0/0C0.JPG": picture(77)}, tmp_path)
    assert prepared(tmp_path, path).count == 13


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("name", ["caf\udce9.jpg", "a\nb.jpg", "a\x1b[31mb.jpg"])
def test_names_that_are_no_text_are_refused_in_one_line_that_has_no_control_characters(tmp_path, kind, name):
    path = tmp_path / "pets"
    if kind == "folder":
        folder(path, FILES | {f"c0/{name}": picture(1)})
    else:
        tar(path, FILES | {f"c0/{name}": picture(1)})
    with pytest.raises(DataError, match="expected UTF-8 without control characters") as caught:
        prepared(tmp_path, path)
    assert str(caught.value).isprintable()


def shard(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


TWICE = {
    "labels": [("a.jpg", picture(1)), ("a.cls", b"0"), ("b.jpg", picture(2)), ("b.cls", b"1"), ("./a.cls", b"2")],
    "images": [("a.jpg", picture(1)), ("a.cls", b"0"), ("a.jpeg", picture(2))],
}


@pytest.mark.parametrize("what", TWICE)
def test_two_labels_or_two_images_of_one_key_are_refused_in_sources_and_in_shards(tmp_path, what):
    path = shard(tmp_path / "wds/0.tar", TWICE[what])
    cure = f"more than once, such as 0/a.cls|two {what} 0/a; expected one per example"
    refused(tmp_path, cure, tmp_path / "wds")
    manifest = make_manifest(
        benchmark="b",
        role="shift",
        labels=["a", "b", "c"],
        label_groups=[[0], [1], [2]],
        classes=["a", "b", "c"],
        shards=[Shard(name="0.tar", count=2 - (what == "images"), sha256=sha256_of(path))],
    )
    with pytest.raises(DataError, match=f"two {what} a; expected one per example"):
        index_shards(tmp_path / "wds", manifest)


def examples_of(seeds: list[int], key: str = "{}") -> list[tuple[str, bytes]]:
    return [
        member
        for i, seed in enumerate(seeds)
        for member in ((f"{key.format(i)}.jpg", picture(seed)), (f"{key.format(i)}.cls", b"1"))
    ]


def test_a_shard_and_its_copy_are_refused_and_keys_that_begin_anew_in_every_shard_are_a_notice(tmp_path):
    shard(tmp_path / "wds/0.tar", examples_of([1, 2]))
    shard(tmp_path / "wds/1.tar", examples_of([3, 4]))
    manifest = prepared(tmp_path, tmp_path / "wds")
    assert manifest.count == 4
    assert manifest.notices == ["shards: 2 keys such as 0 come in several of them, as other images"]
    (tmp_path / "wds/1-copy.tar").write_bytes((tmp_path / "wds/1.tar").read_bytes())
    with pytest.raises(DataError, match=r"the same image under the key 0 in 1-copy/0\.jpg, 1/0\.jpg; .*copies of"):
        prepared(tmp_path, tmp_path / "wds", out="copy")


def test_a_single_webdataset_archive_is_read_where_it_is(tmp_path):
    path = shard(tmp_path / "elsewhere/set.tar", examples_of([1, 2, 3]))
    manifest = prepared(tmp_path, path)
    assert (manifest.root, [s.name for s in manifest.shards]) == (str(tmp_path / "elsewhere"), ["set.tar"])
    assert len(read_all(open_dataset(tmp_path / "out"))[0]) == 3


@pytest.mark.parametrize("change", ["cut", "joined", "gz"])
def test_shards_of_a_manifest_are_read_by_the_same_rules(tmp_path, change):
    path = shard(tmp_path / "0.tar", examples_of([1, 2, 3]))
    content = path.read_bytes()
    changed = {"cut": content[:1000], "joined": content + content, "gz": gzip.compress(content)}[change]
    path.write_bytes(changed)
    facts = {"role": "shift", "labels": ["a", "b"], "label_groups": [[0], [1]], "classes": ["a", "b"]}
    shards = [Shard(name="0.tar", count=3, sha256=sha256_of(path))]
    with pytest.raises(DataError, match=r"0\.tar: got (a damaged archive|data after|an archive that ends)"):
        index_shards(tmp_path, make_manifest(benchmark="b", **facts, shards=shards))


# Blank pictures, and names of images that cannot be one


def test_a_nearly_blank_picture_in_a_zip_is_no_bomb(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1500)).save(buffer, "bmp")
    path = packed("zip", FILES | {"c0/night.bmp": buffer.getvalue()}, tmp_path)
    assert path.stat().st_size < len(buffer.getvalue()) / 200
    assert prepared(tmp_path, path).count == 13


def test_a_kind_of_image_that_is_not_decoded_is_refused_by_its_name(tmp_path):
    path = folder(tmp_path / "pets", FILES | {"c0/new.avif": b"\0\0\0 ftypavif"})
    refused(tmp_path, r"c0/new\.avif, no images by their names; .*; convert, rename or remove them", path)


# Folders of the library datasets


def rows(path: Path, names: list[str] | None, labels: list[int]) -> Path:
    datasets = pytest.importorskip("datasets")
    kind = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    images = [{"bytes": picture(i, "png"), "path": None} for i in range(len(labels))]
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(path)
    return path


def test_names_of_labels_that_are_not_known_are_refused_in_whatever_count(tmp_path):
    from modelstock.data.classes import wnids

    other = [f"thing {i}" for i in range(200)]
    message = r"200 labels such as thing 0, thing 1, .*; expected names or folders of the 200 labels of imagenet-r"
    refused(tmp_path, message, rows(tmp_path / "rows", other, list(range(200))), IMAGENET, labels="imagenet-r")
    known = rows(tmp_path / "known", wnids("imagenet-r")[::-1], list(range(200)))
    manifest = prepared(tmp_path, known, IMAGENET, labels="imagenet-r", out="known-out")
    assert read_all(open_dataset(tmp_path / "known-out"))[1].tolist() == list(range(200))
    assert manifest.count == 200
    numbers = rows(tmp_path / "numbers", None, [2, 0, 1])
    assert prepared(tmp_path, numbers, out="numbers-out").count == 3


# Truncation, anywhere


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip", "nested"])
def test_an_archive_that_ends_early_anywhere_is_refused(tmp_path, kind):
    files = {name: content for name, content in list(imagenet_train().items())[:4]}
    classes = ClassesParams(names=sorted(name[:9] for name in files), templates=["{}"])
    source = tmp_path / "source"
    path = layouts.nested(source / "a.tar", files) if kind == "nested" else packed(kind, files, source)
    whole = path.read_bytes()
    ends = len(whole.rstrip(b"\0")) if kind in ("tar", "nested") else len(whole) - 1
    for size in np.random.default_rng(0).integers(0, ends, 40).tolist():
        path.write_bytes(whole[:size])
        with pytest.raises(DataError) as caught:
            prepared(tmp_path, path, classes)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
