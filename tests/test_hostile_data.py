"""Data from hands that mean harm: each is one line, nothing is executed, nothing outside its folder is written."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image

from modelstock.data import manifest as manifests
from modelstock.data.dataset import open_dataset
from modelstock.data.decoder import Unreadable, decode
from modelstock.data.manifest import read_manifest
from modelstock.data.preparation import prepare
from modelstock.errors import DataError, ModelstockError, ParamsError
from modelstock.params import ClassesParams, PrepareParams
from tests.support.splits import make_split

NAMES = ["cat", "dog"]


# ---------------------------------------------------------------- manifests


@pytest.fixture
def split(tmp_path) -> Path:
    make_split(tmp_path / "data", "shapes", 6)
    return tmp_path / "data"


def edited(folder: Path, **changes: object) -> None:
    """Change a manifest and give it the sha256 of what it then says, as its writer would."""
    path = folder / "manifest.json"
    facts = json.loads(path.read_text()) | changes
    facts["sha256"] = manifests._identity({"border": 0, **facts})
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"root": "pipe:touch trace #"}, "root: the absolute path of a folder"),
        ({"root": "http://127.0.0.1/x"}, "root: the absolute path of a folder"),
        ({"root": "../elsewhere"}, "root: the absolute path of a folder"),
        ({"root": "/a\0b"}, "root: the absolute path of a folder"),
        ({"benchmark": "../../outside"}, "benchmark: "),
        ({"benchmark": "a.b"}, "benchmark: "),
        ({"role": "judge"}, "role: "),
        ({"border": -1}, "border: "),
        ({"count": 7}, "count 7 for shards of 6"),
        ({"label_groups": []}, "0 label_groups for 24 labels"),
        ({"label_groups": [[99]] * 24}, "label_groups outside 0 to 23"),
        ({"label_groups": [[-1]] * 24}, "label_groups outside 0 to 23"),
        ({"label_groups": [[0, 0]] * 24}, "a class twice in one of label_groups"),
        ({"labels": ["same"] * 24}, "a label that comes twice"),
        ({"shards": []}, "shards: "),
        ({"shards": [{"name": "../../x.tar", "count": 6, "sha256": "a" * 64}]}, "shards.0.name: "),
        ({"shards": [{"name": "000000.tar", "count": 6, "sha256": "x"}]}, "shards.0.sha256: "),
        ({"harm": 1}, "harm: "),
    ],
)
def test_a_manifest_that_says_what_none_may_say_is_refused(split, monkeypatch, changes, line):
    monkeypatch.chdir(split.parent)
    edited(split, **changes)
    with pytest.raises(DataError, match=r"manifest\.json: got ") as refusal:
        open_dataset(split)
    assert line in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (split.parent / "trace").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 200_000, b'{"a":' * 100_000, b"", b"[]", b"null"])
def test_a_manifest_that_is_none_is_refused(split, content):
    (split / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json: got "):
        read_manifest(split)


def test_a_manifest_of_no_end_is_not_read(split, monkeypatch):
    monkeypatch.setattr(manifests, "_LARGEST", 1000)
    with pytest.raises(DataError, match=r"got \d{4} bytes"):
        read_manifest(split)


@pytest.mark.parametrize("name", ["a.b", "../a", "a/b", "A", "", "a" * 101, "-a", "a b"])
def test_a_split_has_a_name_that_files_and_dvc_can_have(name):
    with pytest.raises(ValueError, match="pattern"):
        PrepareParams(**settings({name: {"source": "files", "path": "x", "role": "shift"}}))


# ---------------------------------------------------------------- images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(trace) (w) file closefile\nshowpage\n%%EOF\n"
FITS = b"SIMPLE  =                    T".ljust(80) + b"BITPIX  =                    8".ljust(80) + b" " * 2720
PSD = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + b"\0" * 200
WMF = b"\xd7\xcd\xc6\x9a" + b"\0" * 200


def huge_png(side: int) -> bytes:
    """The head of a PNG that claims to be `side` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 10)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content",
    [
        EPS,
        FITS,
        PSD,
        WMF,
        b"",
        b"\xff\xd8\xff",
        huge_png(20_000),
        huge_png(2**31 - 1),
        b"GIF89a" + b"\0" * 20,
        b"<svg/>",
    ],
)
def test_what_is_no_image_of_ours_is_unreadable_and_starts_no_program(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    for name in ("Popen", "run", "check_call"):
        monkeypatch.setattr(f"subprocess.{name}", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(Unreadable) as refusal:
        decode(content)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- archives


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(buffer, "png")
    return buffer.getvalue()


def settings(splits: dict) -> dict:
    return {"seed": 0, "shard_size": 10, "reference_draws": 1, "reference_epochs": 1, "splits": splits}


def prepared(source: Path, out: Path):
    split = {"source": "files", "path": str(source), "role": "shift"}
    params = PrepareParams(**settings({"x": split}), unreadable=0.0)
    classes = ClassesParams(names=NAMES, templates=["{}"])
    return prepare("x", params, classes, out, scratch=out.with_name("scratch"))


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name in NAMES:
            member = tarfile.TarInfo(f"{name}/good.png")
            member.size = len(picture())
            tar.addfile(member, io.BytesIO(picture()))
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@pytest.mark.parametrize(
    "member",
    [
        entry("../outside.png"),
        entry("/tmp/outside.png"),
        entry("cat/../../outside.png"),
        entry("cat\\..\\..\\outside.png"),
        entry("C:/outside.png"),
        entry("cat/link.png", tarfile.SYMTYPE, "/etc/hostname"),
        entry("cat/hard.png", tarfile.LNKTYPE, "../../outside.png"),
        entry("cat/device.png", tarfile.CHRTYPE),
        entry("cat/pipe.png", tarfile.FIFOTYPE),
    ],
    ids=lambda member: member.name,
)
@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_an_archive_that_leads_out_of_itself_is_refused_and_nothing_is_written(tmp_path, member, suffix):
    content = picture() if member.isreg() else b""
    source = tar_of(tmp_path / f"x.{suffix}", (member, content), mode="w:gz" if suffix == "tar.gz" else "w")
    with pytest.raises(DataError, match=r"x\.tar"):
        prepared(source, tmp_path / "out")
    assert not (tmp_path / "outside.png").exists()
    assert not (tmp_path / "out/manifest.json").exists()


def zip_of(path: Path, extra: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES:
            archive.writestr(f"{name}/good.png", picture())
        for name, content in extra.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize(
    "extra",
    [
        {"../outside.png": picture()},
        {"/outside.png": picture()},
        {"cat/bomb.png": b"\0" * (80 << 20)},
        {"cat/eps.jpg": EPS},
        {"cat/empty.png": b""},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_a_zip_of_harm_is_refused(tmp_path, extra):
    with pytest.raises(DataError):
        prepared(zip_of(tmp_path / "x.zip", extra), tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.2])  # of a tar: within its members
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_that_ends_early_is_refused(tmp_path, kind, share):
    whole = tmp_path / f"whole.{kind}"
    if kind == "zip":
        zip_of(whole, {})
    else:
        tar_of(whole, mode="w:gz" if kind == "tar.gz" else "w")
    content = whole.read_bytes()
    shorter = content[: round(share * len(content))]
    source = tmp_path / f"x.{kind}"
    source.write_bytes(shorter)
    with pytest.raises(ModelstockError) as refusal:
        prepared(source, tmp_path / "out")
    assert isinstance(refusal.value, DataError | ParamsError)
    assert "\n" not in str(refusal.value)


def test_a_folder_with_links_out_of_it_is_refused(tmp_path):
    for name in NAMES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        (tmp_path / "photos" / name / "a.png").write_bytes(picture())
    os.symlink("/etc/hostname", tmp_path / "photos/cat/b.png")
    with pytest.raises(DataError, match=r"link cat/b\.png"):
        prepared(tmp_path / "photos", tmp_path / "out")
