"""One pass over the data gives each weight set what scoring it alone gives, to the last example."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

import modelstock.scoring.one_pass as one_pass
from modelstock import provenance
from modelstock.damage import CACHE, cure_of
from modelstock.data.dataset import open_dataset, read_all
from modelstock.data.examples import InShards
from modelstock.data.images import normalise
from modelstock.errors import DataError, WeightsError
from modelstock.models.towers import TINY_CLIP, build_classifier, build_clip, tensors_of
from modelstock.notices import Notice
from modelstock.scoring.decoding import DecodedBatches
from modelstock.scoring.one_pass import ScoringOptions, collect
from modelstock.scoring.outcome import COLUMNS, Outcome, label_logits
from modelstock.scoring.results import Row, load_scores, save_scores
from modelstock.scoring.score_cache import ensemble_identity
from modelstock.weights.weight_set import LazyArrays, WeightSet, load_weights
from tests.support.splits import make_split


def score(folder, weights, ensembles=(), **options):
    """`one_pass.score` of a folder, with its options as keywords."""
    return one_pass.score(open_dataset(folder), weights, ensembles, ScoringOptions(**options))


def alone(folder, weights):
    """The plain way: one model, all images at once; logits of the head's classes."""
    dataset = open_dataset(folder)
    (images, labels), manifest = read_all(dataset), dataset.manifest
    with torch.inference_mode():
        logits = build_classifier(weights)(normalise(images, weights.meta["preprocess"]))
    return logits, labels, manifest


@pytest.mark.parametrize("split", ["shapes", "shapes-rendition", "shapes-objectnet"])
def test_one_pass_equals_scoring_each_weight_set_alone(tmp_path, variants, split):
    make_split(tmp_path, split, 130)
    together = score(tmp_path, variants, batch_size=37)
    for weights in variants:
        logits, labels, manifest = alone(tmp_path, weights)
        grouped = np.stack([logits[:, g].max(dim=1).values.numpy() for g in manifest.label_groups], axis=1)
        outcome = together[weights.identity]
        np.testing.assert_array_equal(outcome.prediction, grouped.argmax(axis=1))
        np.testing.assert_array_equal(outcome.correct, grouped.argmax(axis=1) == labels)
        five = np.argsort(-grouped, axis=1, kind="stable")[:, :5]
        np.testing.assert_array_equal(outcome.correct5, (five == labels[:, None]).any(axis=1))
        exponents = np.exp(grouped - grouped.max(axis=1, keepdims=True))
        np.testing.assert_allclose(outcome.confidence, 1 / exponents.sum(axis=1), rtol=1e-5)
        chance = exponents[np.arange(130), labels] / exponents.sum(axis=1)
        np.testing.assert_allclose(outcome.nll, -np.log(chance), rtol=1e-4, atol=1e-6)


def test_an_outcome_by_hand():
    logits = torch.log(torch.tensor([[0.4, 0.3, 0.1, 0.1, 0.05, 0.05], [0.1, 0.1, 0.2, 0.2, 0.3, 0.1]]))
    found = Outcome.of(logits, torch.tensor([5, 2]), [[i] for i in range(6)])
    assert found.prediction.tolist() == [0, 4]
    assert found.correct.tolist() == [False, False]
    assert found.correct5.tolist() == [False, True]  # of the two at 0.05, the lower label is the fifth
    np.testing.assert_allclose(found.confidence, [0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found.nll, [-np.log(0.05), -np.log(0.2)], rtol=1e-6)


def test_fewer_labels_than_five_are_all_among_the_first_five():
    assert Outcome.of(torch.zeros(2, 3), torch.tensor([2, 0]), [[0], [1], [2]]).correct5.all()


def equal(first: dict[str, Outcome], second: dict[str, Outcome]) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(getattr(first[k], name), getattr(second[k], name)) for k in first for name in COLUMNS
    )


@pytest.mark.parametrize(
    "options", [{"resident": 1}, {"resident": 2}, {"workers": 2}, {"resident": 2, "workers": 2}], ids=str
)
def test_taking_turns_on_the_device_and_decoding_processes_change_no_bit(tmp_path, variants, options, monkeypatch):
    make_split(tmp_path, "shapes", 130)
    ensembles = [[w.identity for w in variants], [variants[2].identity, variants[0].identity]]
    expected = score(tmp_path, variants, ensembles, batch_size=20)
    monkeypatch.setattr(one_pass, "SPAN_BYTES", 3 * 20 * 3 * 32 * 32)  # three batches a turn
    assert equal(score(tmp_path, variants, ensembles, batch_size=20, **options), expected)


def test_weights_read_from_their_file_a_tensor_at_a_time_score_the_same(tmp_path, variants):
    make_split(tmp_path / "data", "shapes", 40)
    for number, weights in enumerate(variants):
        weights.save(tmp_path / f"{number}.safetensors")
    lazy = [load_weights(tmp_path / f"{number}.safetensors", lazy=True) for number in range(3)]
    assert [w.identity for w in lazy] == [w.identity for w in variants]
    assert equal(score(tmp_path / "data", lazy), score(tmp_path / "data", variants))


def test_a_tower_reads_each_tensor_of_its_file_once(tmp_path, variants, monkeypatch):
    """Towers that take turns are built again and again."""
    variants[0].save(tmp_path / "a.safetensors")
    lazy = load_weights(tmp_path / "a.safetensors", lazy=True)
    read, get = Counter(), LazyArrays.__getitem__

    def counted(self, name):
        read[name] += 1
        return get(self, name)

    monkeypatch.setattr(LazyArrays, "__getitem__", counted)
    build_classifier(lazy)
    assert read == dict.fromkeys(variants[0].tensors, 1)


def test_weight_sets_of_different_input_sizes_share_the_pass(tmp_path, variants):
    """A tower for 16 pixels sees what open_clip's own transform would show it."""
    make_split(tmp_path, "shapes", 30)
    config = {**TINY_CLIP, "vision_cfg": {**TINY_CLIP["vision_cfg"], "image_size": 16}}
    torch.manual_seed(1)
    tensors = {k: v for k, v in tensors_of(build_clip(config)).items() if k.startswith("visual.")}
    tensors |= {k: v for k, v in variants[0].tensors.items() if k.startswith("head.")}
    preprocess = {**variants[0].meta["preprocess"], "size": 16, "mean": [0.4, 0.5, 0.6]}
    small = WeightSet(tensors, {**variants[0].meta, "architecture": config, "preprocess": preprocess}, "small")
    found = score(tmp_path, [variants[0], small, variants[1]])
    assert equal({k: found[k] for k in (w.identity for w in variants[:2])}, score(tmp_path, variants[:2]))
    images, labels = read_all(open_dataset(tmp_path))
    transform = open_clip.image_transform(16, is_train=False, mean=(0.4, 0.5, 0.6), std=(0.25,) * 3)
    pixels = torch.stack([transform(Image.fromarray(image)) for image in images])
    with torch.inference_mode():
        guess = build_classifier(small)(pixels).argmax(dim=1).numpy()
    np.testing.assert_array_equal(found[small.identity].prediction, guess)
    assert found[small.identity].correct.sum() == (guess == labels).sum()


def test_bfloat16_is_near_float32_and_kept_apart_from_it(tmp_path, variants):
    make_split(tmp_path / "data", "shapes", 100)
    exact = score(tmp_path / "data", variants[:1], cache=tmp_path / "cache")
    rough = score(tmp_path / "data", variants[:1], cache=tmp_path / "cache", precision="bfloat16")
    one, two = (found[variants[0].identity] for found in (exact, rough))
    assert not np.array_equal(one.nll, two.nll)
    np.testing.assert_allclose(one.nll, two.nll, atol=0.2)
    assert equal(score(tmp_path / "data", variants[:1], cache=tmp_path / "cache"), exact)


def test_the_same_tensors_with_another_preprocess_are_scored_again(tmp_path, variants):
    make_split(tmp_path / "data", "shapes", 40)
    first = score(tmp_path / "data", variants[:1], cache=tmp_path / "cache")
    meta = {**variants[0].meta, "preprocess": {**variants[0].meta["preprocess"], "mean": [0.0, 0.0, 0.0]}}
    other = score(tmp_path / "data", [WeightSet(variants[0].tensors, meta, "other")], cache=tmp_path / "cache")
    assert not equal(first, other)


class Stopped(BaseException):
    """As Ctrl-C: nobody catches it on the way."""


def test_an_interrupted_pass_goes_on_where_it_was_and_ends_with_the_same_bits(tmp_path, variants, monkeypatch):
    make_split(tmp_path / "data", "shapes", 130)
    ensembles = [[w.identity for w in variants[:2]]]
    expected = score(tmp_path / "data", variants, ensembles, batch_size=20)
    read = DecodedBatches.__getitem__
    numbers: list[int] = []

    def stopping(self, number):
        numbers.append(number)
        if number == 4 and numbers.count(4) == 1:
            raise Stopped
        return read(self, number)

    monkeypatch.setattr(DecodedBatches, "__getitem__", stopping)
    call = partial(score, tmp_path / "data", batch_size=20, cache=tmp_path / "cache")
    with pytest.raises(Stopped):
        call(variants[:2], ensembles)
    assert equal(call(variants, ensembles), expected)
    assert numbers == [0, 1, 2, 3, 4, *range(7)]  # the third weight set had nothing yet
    assert equal(call(variants, ensembles), expected)
    assert len(numbers) == 12


def test_a_pass_that_is_killed_keeps_what_it_had_scored(tmp_path, variants):
    make_split(tmp_path / "data", "shapes", 600, shard_size=200)
    variants[0].save(tmp_path / "a.safetensors")
    script = f"""
import os, signal
from pathlib import Path
from modelstock.damage import CACHE, cure_of
from modelstock.data.dataset import open_dataset
from modelstock.scoring import one_pass
from modelstock.notices import Notice
from modelstock.scoring.decoding import DecodedBatches
from modelstock.weights.weight_set import load_weights
one_pass.SAVE_EVERY_S = 0.0
read = DecodedBatches.__getitem__
def killed(self, number):
    if number == 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, number)
DecodedBatches.__getitem__ = killed
folder = Path({str(tmp_path)!r})
options = one_pass.ScoringOptions(cache=folder / "cache", batch_size=10)
one_pass.score(open_dataset(folder / "data"), [load_weights(folder / "a.safetensors")], options=options)
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=root)
    assert done.returncode == -signal.SIGKILL, done.stderr
    kept = Outcome.load(next((tmp_path / "cache").rglob("*.safetensors")))
    assert kept is not None
    assert len(kept.correct) == 400
    again = score(tmp_path / "data", variants[:1], cache=tmp_path / "cache", batch_size=10)
    assert equal(again, score(tmp_path / "data", variants[:1], batch_size=10))


@pytest.mark.parametrize("resident", [1, 2])
def test_an_interrupt_during_a_turn_keeps_what_is_scored_and_ends_the_thread_that_builds(
    tmp_path, variants, monkeypatch, resident
):
    make_split(tmp_path / "data", "shapes", 130)
    ensembles = [[w.identity for w in variants[:2]]]
    expected = score(tmp_path / "data", variants, ensembles, batch_size=20)
    monkeypatch.setattr(one_pass, "SPAN_BYTES", 3 * 20 * 3 * 32 * 32)  # three batches a turn
    logits, scored = one_pass.Tower.logits, []

    def stopping(self, pixels):
        scored.append(self.identity)
        if len(scored) == 15:  # 9 in the first span; in the second, the third weight set's 3 and 2 of the second's
            raise Stopped
        return logits(self, pixels)

    monkeypatch.setattr(one_pass.Tower, "logits", stopping)
    call = partial(score, tmp_path / "data", batch_size=20, cache=tmp_path / "cache", resident=resident)
    with pytest.raises(Stopped):
        call(variants, ensembles)
    assert [w.identity for w in variants for _ in range(3)] == scored[:9]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("next turn")]
    assert equal(call(variants, ensembles), expected)
    again = Counter(scored[15:])
    # The ensemble had the first span's 3 of 7 batches, so that its members go on from there.
    assert [again[w.identity] for w in variants] == [4, 4, 1]


def test_a_tower_that_a_turn_ahead_cannot_build_is_refused_and_what_is_scored_is_kept(tmp_path, variants):
    make_split(tmp_path / "data", "shapes", 40)
    tensors = {k: v for k, v in variants[1].tensors.items() if k != "visual.proj"}
    lacking = WeightSet(tensors, variants[1].meta, "lacking")
    with pytest.raises(WeightsError, match=r"lacking: got visual\.proj missing"):
        score(tmp_path / "data", [variants[0], lacking, variants[2]], cache=tmp_path / "cache", resident=2)
    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    assert len(Outcome.load(kept)) == 40


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_decode_is_named(tmp_path, variants, monkeypatch, workers):
    make_split(tmp_path, "shapes", 30)
    monkeypatch.setattr(InShards, "content", lambda self, row: b"no image")
    with pytest.raises(DataError, match=r"example 0: got UnidentifiedImageError: .*; expected an image that decodes"):
        score(tmp_path, variants, workers=workers)


def test_the_ensemble_is_the_mean_of_the_members_logits(tmp_path, variants):
    make_split(tmp_path, "shapes", 60)
    identities = [w.identity for w in variants[:2]]
    found = score(tmp_path, variants, [identities])[ensemble_identity(identities[::-1])]
    mean = (alone(tmp_path, variants[0])[0] + alone(tmp_path, variants[1])[0]) / 2
    np.testing.assert_array_equal(found.prediction, mean.argmax(dim=1).numpy())


def test_label_logits_by_hand():
    logits = torch.tensor([[1.0, 5.0, 2.0, 4.0]])
    assert label_logits(logits, [[2], [0]]).tolist() == [[2.0, 1.0]]
    assert label_logits(logits, [[0, 1], [2, 3]]).tolist() == [[5.0, 4.0]]


@pytest.mark.filterwarnings("ignore:.*scored again")
def test_every_image_is_decoded_once_and_what_is_scored_is_not_scored_again(tmp_path, variants, monkeypatch):
    make_split(tmp_path / "data", "shapes", 60)
    rows = []
    cut = InShards.cut

    def counted(self, row):
        rows.append(row)
        return cut(self, row)

    monkeypatch.setattr(InShards, "cut", counted)
    cache, data = tmp_path / "cache", tmp_path / "data"
    first = score(data, variants[:2], cache=cache)
    assert rows == list(range(60))
    again = score(data, variants[:2], cache=cache)
    assert len(rows) == 60
    assert equal(first, again)
    score(data, variants, cache=cache)
    assert len(rows) == 120
    next(cache.rglob("*.safetensors")).write_bytes(b"broken")
    score(data, variants, cache=cache)
    assert len(rows) == 180


def test_results_read_back_and_their_bytes_repeat(tmp_path, variants):
    manifest = make_split(tmp_path / "data", "shapes", 60)
    rows = [
        Row(name=f"seed-{i}", identity=w.identity, kind="seed", members=(i,), options={"lr": 0.1})
        for i, w in enumerate(variants)
    ]
    scores = collect(open_dataset(tmp_path / "data"), rows, score(tmp_path / "data", variants))
    save_scores(tmp_path / "a", scores)
    save_scores(tmp_path / "b", scores)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    read = load_scores(tmp_path / "a")
    assert (read.benchmark, read.role, read.data, read.rows) == (
        "shapes",
        "in-distribution",
        manifest.sha256,
        tuple(rows),
    )
    np.testing.assert_array_equal(read.correct, scores.correct)
    np.testing.assert_array_equal(read.nll, scores.nll)
    np.testing.assert_array_equal(np.array(read.labels)[read.truth], np.array(manifest.labels)[read.truth])
    np.testing.assert_array_equal(read.truth, read_all(open_dataset(tmp_path / "data"))[1])
    with pytest.raises(DataError, match="expected results per example"):
        load_scores(tmp_path / "absent")
    assert Outcome.load(tmp_path / "absent") is None


def test_results_carry_the_notices_of_their_data_and_weight_sets(tmp_path, variants):
    make_split(tmp_path / "data", "shapes", 20)
    dataset = open_dataset(tmp_path / "data")
    unusual = WeightSet(variants[0].tensors, {**variants[0].meta, "notices": ["stored as bfloat16"]}, "unusual")
    rows = [Row(f"seed-{i}", w.identity, "seed", (i,), {}) for i, w in enumerate([unusual, variants[1]])]
    scores = collect(dataset, rows, score(tmp_path / "data", variants), [unusual, variants[1]])
    assert scores.notices == ("seed-0: stored as bfloat16",)
    save_scores(tmp_path / "results", scores)
    assert load_scores(tmp_path / "results").notices == scores.notices
    save_scores(tmp_path / "results", collect(dataset, rows, score(tmp_path / "data", variants), variants))
    assert load_scores(tmp_path / "results").notices == ()


class TestDamagedFiles:
    """Whatever byte of what was written changes, no number comes of it."""

    @pytest.fixture
    def results(self, tmp_path, variants):
        """The results of three weight sets, in a file."""
        make_split(tmp_path / "data", "shapes", 40)
        rows = [Row(f"seed-{i}", w.identity, "seed", (i,), {}) for i, w in enumerate(variants)]
        scores = collect(open_dataset(tmp_path / "data"), rows, score(tmp_path / "data", variants))
        save_scores(tmp_path / "shapes.safetensors", scores)
        return scores, tmp_path / "shapes.safetensors"

    def test_results_with_any_byte_changed_missing_or_added_are_refused_by_name(self, results):
        _, path = results
        whole = path.read_bytes()
        damaged = {"truncated": whole[:-9], "empty": b"", "longer": whole + b"\0", "another kind": b"PK" + whole[2:]}
        for place in np.random.default_rng(0).choice(len(whole), 150, replace=False).tolist():
            damaged[str(place)] = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        for content in damaged.values():
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"shapes\.safetensors: got .*; make it again") as caught:
                load_scores(path)
            assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("column", "change", "message"),
        [
            ("correct", lambda a: ~a, "correct that is not where the prediction is the truth"),
            ("correct5", lambda a: a[:, 1:], r"correct5 of shape \(3, 39\) for 3 rows and 40 examples"),
            ("nll", lambda a: a[1:], r"nll of shape \(2, 40\) for 3 rows"),
            ("prediction", lambda a: a + 24, "prediction beyond the 24 labels"),
            ("truth", lambda a: a - 1, "truth beyond the 24 labels"),
            ("confidence", lambda a: a + 1, "confidence beyond 0 to 1"),
            ("nll", lambda a: a - 99, "nll below 0"),
        ],
    )
    def test_results_that_contradict_themselves_are_refused(self, results, column, change, message):
        scores, path = results
        save_scores(path, replace(scores, **{column: change(getattr(scores, column))}))
        with pytest.raises(DataError, match=message):
            load_scores(path)

    def test_two_rows_of_one_name_are_refused(self, results):
        scores, path = results
        save_scores(path, replace(scores, rows=(scores.rows[0], *scores.rows[:2])))
        with pytest.raises(DataError, match="the row seed-0 twice"):
            load_scores(path)

    def test_the_cure_names_dvcs_copy_which_shares_the_damaged_bytes(self, results, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        _, path = results
        copy = Path(".dvc/cache/files/md5/ab/cdef")
        copy.parent.mkdir(parents=True)
        os.link(path, copy)
        Path("dvc.lock").write_text(
            "stages:\n  evaluate@shapes:\n    outs:\n    - {path: shapes.safetensors, md5: abcdef}\n"
        )
        path.write_bytes(path.read_bytes()[:-1])
        cure = "rm -f shapes.safetensors .dvc/cache/files/md5/ab/cdef; dvc repro evaluate@shapes"
        with pytest.raises(DataError, match=re.escape(cure)):
            load_scores(Path("shapes.safetensors"))

    def test_a_damaged_file_in_a_folder_that_is_an_output_is_found_in_dvcs_cache(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name, content in {"12/3.dir": '[{"md5": "4567", "relpath": "0-1.safetensors"}]', "45/67": "bytes"}.items():
            (CACHE / name).parent.mkdir(parents=True)
            (CACHE / name).write_text(content)
        Path("dvc.lock").write_text(
            "stages:\n  merge@ties:\n    outs:\n    - {path: models/merged/ties, md5: 123.dir}\n"
        )
        found = cure_of(Path("models/merged/ties/0-1.safetensors"), "otherwise")
        assert "rm -f models/merged/ties/0-1.safetensors .dvc/cache/files/md5/45/67; dvc repro merge@ties" in found
        assert cure_of(Path("elsewhere"), "otherwise") == "otherwise"
        Path("dvc.lock").unlink()
        assert cure_of(Path("models/merged/ties/0-1.safetensors"), "otherwise") == "otherwise"

    @pytest.mark.parametrize("damage", ["40 values", "a shorter column", "truncated", "empty", "of another weight set"])
    def test_a_damaged_outcome_is_scored_again_and_said_so(self, tmp_path, variants, damage):
        make_split(tmp_path / "data", "shapes", 60)
        cache = tmp_path / "cache"
        expected = score(tmp_path / "data", variants[:2], cache=cache)
        for file in sorted(cache.rglob("*.safetensors")):
            with safe_open(file, framework="numpy") as opened:
                arrays, metadata = {name: opened.get_tensor(name) for name in COLUMNS}, opened.metadata()
            if damage == "40 values":
                arrays["correct"][:40] = True
                save_file(arrays, file, metadata)
            elif damage == "a shorter column":
                save_file({**arrays, "nll": arrays["nll"][:-1].copy()}, file, metadata)
            elif damage == "truncated":
                file.write_bytes(file.read_bytes()[:-10])
            elif damage == "empty":
                file.write_bytes(b"")
        if damage == "of another weight set":
            first, second = sorted(cache.rglob("*.safetensors"))
            shutil.copy(first, second)
        with pytest.warns(Notice, match="not used, and scored again"):
            again = score(tmp_path / "data", variants[:2], cache=cache)
        for identity, outcome in expected.items():
            assert all(np.array_equal(getattr(outcome, c), getattr(again[identity], c)) for c in COLUMNS)


def test_a_tower_that_does_not_fit_and_an_unknown_member_are_refused(tmp_path, variants):
    make_split(tmp_path, "shapes", 10)
    lacking = {k: v for k, v in variants[0].tensors.items() if k != "visual.proj"}
    with pytest.raises(WeightsError, match=r"got visual\.proj missing"):
        score(tmp_path, [WeightSet(lacking, variants[0].meta, "lacking")])
    with pytest.raises(WeightsError, match="ensemble: got member 0123"):
        score(tmp_path, variants, [["0123"]])


def test_results_are_read_without_torch():
    script = "import sys, modelstock.scoring, modelstock.scoring.results; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent).returncode == 0


class TestTheCacheKnowsWhatScored:
    """What other code, another library or another number of threads scored is not used."""

    @pytest.fixture
    def decoded(self, tmp_path, monkeypatch):
        """The rows that have been decoded so far."""
        make_split(tmp_path / "data", "shapes", 40)
        rows, cut = [], InShards.cut

        def counted(self, row):
            rows.append(row)
            return cut(self, row)

        monkeypatch.setattr(InShards, "cut", counted)
        return rows

    @pytest.fixture(autouse=True)
    def _read_again(self):
        """The library's source is read once per process; here it changes."""
        yield
        self.forget()

    def forget(self):
        provenance._read.cache_clear()
        provenance.modules_of.cache_clear()

    def library(self, folder, monkeypatch):
        """A copy of the library, taken for ours from now on."""
        copy = folder / "copy"
        shutil.copytree(provenance.ROOT / "modelstock", copy / "modelstock")
        monkeypatch.setattr(provenance, "ROOT", copy)
        self.forget()
        return copy

    def scored(self, folder, variants):
        return score(folder / "data", variants[:1], cache=folder / "cache")

    def test_after_a_change_of_a_librarys_version_old_outcomes_are_not_used(
        self, tmp_path, variants, decoded, monkeypatch
    ):
        self.scored(tmp_path, variants)
        self.scored(tmp_path, variants)
        assert len(decoded) == 40
        real = provenance._version
        monkeypatch.setattr(provenance, "_version", lambda name: "99.0" if name == "pillow" else real(name))
        self.scored(tmp_path, variants)
        assert len(decoded) == 80

    @pytest.mark.parametrize("module", ["scoring/outcome.py", "data/images.py", "models/towers.py"])
    def test_after_a_change_of_code_that_scores_old_outcomes_are_not_used(
        self, tmp_path, variants, decoded, monkeypatch, module
    ):
        self.scored(tmp_path, variants)
        copy = self.library(tmp_path, monkeypatch)
        self.scored(tmp_path, variants)
        assert len(decoded) == 40  # the same code elsewhere
        with open(copy / "modelstock" / module, "a") as file:
            file.write("# changed\n")
        self.scored(tmp_path, variants)
        assert len(decoded) == 80

    def test_a_change_of_what_does_not_score_leaves_outcomes_in_use(self, tmp_path, variants, decoded, monkeypatch):
        self.scored(tmp_path, variants)
        copy = self.library(tmp_path, monkeypatch)
        for module in ("errors.py", "comparison/report.py", "merging/engine.py"):
            with open(copy / "modelstock" / module, "a") as file:
                file.write("# changed\n")
        self.scored(tmp_path, variants)
        assert len(decoded) == 40

    def test_another_number_of_threads_scores_again(self, tmp_path, variants, decoded, monkeypatch):
        self.scored(tmp_path, variants)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
        self.scored(tmp_path, variants)
        assert len(decoded) == 80

    def test_what_other_code_scored_on_the_same_data_is_removed_and_nothing_else(
        self, tmp_path, variants, decoded, monkeypatch
    ):
        self.scored(tmp_path, variants)
        (old,) = (tmp_path / "cache").rglob("*.safetensors")
        other_data = tmp_path / "cache/other-data/code/kept.safetensors"
        other_data.parent.mkdir(parents=True)
        other_data.write_bytes(b"")
        monkeypatch.setattr(provenance, "_version", lambda name: "99.0")
        self.scored(tmp_path, variants)
        assert not old.exists()
        files = set((tmp_path / "cache").rglob("*.safetensors"))
        assert len(files) == 2
        assert other_data in files
