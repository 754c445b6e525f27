"""Scoring and statistics of text towers, against single texts and definitions computed another way."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from torch.nn import functional

from modelstock import cli
from modelstock.data.dataset import open_dataset
from modelstock.data.preprocess import framer_of
from modelstock.data.tokens import Tokenization
from modelstock.errors import DataError, MergeError, WeightsError
from modelstock.geometry.groups import groups
from modelstock.geometry.measure import measure
from modelstock.geometry.points import points
from modelstock.geometry.space import Space, checkpoint_of
from modelstock.geometry.tables import tensor_rows, unit_rows
from modelstock.merging.checks import check_parents
from modelstock.models.anchor import text_anchor_of
from modelstock.models.classify import ImageClassifier, TextClassifier, classifier_of
from modelstock.models.text_towers import text_side
from modelstock.models.towers import build_classifier
from modelstock.params import GeometryParams
from modelstock.scoring import precision
from modelstock.scoring.data_statistics import fisher, inner, loss_gradient, sample
from modelstock.scoring.one_pass import ScoringOptions, collect, score
from modelstock.scoring.precision import fastest, speeds
from modelstock.scoring.results import Row
from modelstock.weights.weight_set import WeightSet, load_weights
from tests.support.merging import merge_with
from tests.support.models import clip_of
from tests.support.splits import make_split
from tests.support.text_shards import make_texts
from tests.support.texts import LENGTH, SMALL_CLIP, Sentences, clip_text_anchor, encoder_folder, text_anchor

# Of open_clip's tokens, "!" is number 0, with which texts are filled up.
TEXTS = [*Sentences(12).texts, "!= a film", "a != != plot !=", "fine", "so cold !="]
LABELS = [*Sentences(12).labels.tolist(), 1, 0, 1, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder") / "bert")


def without_mask():
    """A CLIP's text tower that sees what fills a text up, and takes the last token."""
    text = {**SMALL_CLIP["text_cfg"], "no_causal_mask": True, "pool_type": "last"}
    side = text_side(clip_of({**SMALL_CLIP, "custom_text": True, "text_cfg": text})[1], length=16)
    assert side.meta["preprocess"]["padding"] == "length"
    return text_anchor_of(side, ["bad", "good"], [lambda name: name])


@pytest.fixture(scope="module")
def anchors(folder):
    return {"transformers": text_anchor(folder), "open_clip": clip_text_anchor(), "without mask": without_mask()}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_texts(tmp_path_factory.mktemp("texts"), TEXTS, LABELS)


def near(anchor, seed, **meta):
    """A weight set near the anchor, as if fine-tuned."""
    random = np.random.default_rng(seed)
    tensors = {
        k: (v + 0.05 * random.standard_normal(v.shape)).astype(v.dtype) if v.dtype.kind == "f" else v
        for k, v in anchor.tensors.items()
    }
    made = {"stage": "finetune", "seed": seed, "options": {}, "version": "test"}
    more = {"parents": [anchor.identity], "made_by": made, **meta}
    return WeightSet(tensors, {**anchor.meta, **more}, f"seed {seed}")


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["modelstock", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code, capsys.readouterr()


KINDS = ["transformers", "open_clip", "without mask"]


# ---------------------------------------------------------------- one pass


def alone(weights, text):
    """Logits of one text, without any token that fills up, or with as many as there can be."""
    model, framer = build_classifier(weights), framer_of(weights.meta["preprocess"])
    tokens = torch.from_numpy(framer(text))[None]
    filled = functional.pad(tokens, (0, framer.length - tokens.shape[1]), value=framer.pad)
    with torch.inference_mode():
        ways = [filled] if framer.padding == "length" else [tokens, filled]
        return [model.logits(model.tower(way))[0] for way in ways]


@pytest.mark.parametrize("kind", KINDS)
def test_a_texts_scores_are_its_own_in_any_batch_and_order_and_however_it_is_filled_up(tmp_path, anchors, data, kind):
    weights = near(anchors[kind], 1)
    backwards = make_texts(tmp_path, TEXTS[::-1], LABELS[::-1])
    by_hand = [alone(weights, text) for text in TEXTS]
    for ways in by_hand:
        np.testing.assert_allclose(ways[0], ways[-1], atol=1e-5)
    logits = torch.stack([ways[0] for ways in by_hand])
    nll = functional.cross_entropy(logits, torch.tensor(LABELS), reduction="none").numpy()
    for dataset, way in ((data, 1), (backwards, -1)):
        for batch_size in (1, 5, 64):
            found = score(dataset, [weights], options=ScoringOptions(batch_size=batch_size))[weights.identity]
            np.testing.assert_array_equal(found.prediction[::way], logits.argmax(dim=1).numpy())
            np.testing.assert_allclose(found.nll[::way], nll, atol=1e-5)


def test_token_0_in_a_text_does_not_shorten_it(anchors):
    framer = framer_of(anchors["open_clip"].meta["preprocess"])
    assert 0 in framer("a != plot")[1:-1]
    model = build_classifier(anchors["open_clip"])
    texts = [framer("fine != plot"), framer("fine != cold dark actor")]
    with torch.inference_mode():
        whole = model.logits(model.tower(framer.batch(texts)))
        np.testing.assert_allclose(model(framer.batch(texts)), whole, atol=1e-5)
        for tokens, logits in zip(texts, whole, strict=True):
            np.testing.assert_allclose(model(framer.batch([tokens]))[0], logits, atol=1e-5)
            shortened = model.logits(model.tower(framer.batch([tokens[:-1]])))[0]  # what one token less would give
            assert (shortened - logits).abs().max() > 1e-4


def test_texts_become_tokens_once_for_all_weight_sets_that_share_a_tokenization(anchors, data, monkeypatch):
    made, call = Counter(), Tokenization.__call__

    def counted(self, text):
        made[self.length] += 1
        return call(self, text)

    monkeypatch.setattr(Tokenization, "__call__", counted)
    anchor = anchors["transformers"]
    shorter = {"preprocess": {**anchor.meta["preprocess"], "length": 5}}
    weights = [anchor, near(anchor, 1), near(anchor, 2), near(anchor, 3, **shorter)]
    score(data, weights, options=ScoringOptions(batch_size=4, resident=1))
    assert made == {LENGTH: len(TEXTS), 5: len(TEXTS)}


@pytest.mark.parametrize("change", [{"length": 5}, {"cleaning": "lower"}, {"padding": "length"}])
def test_the_same_tensors_with_another_tokenization_are_scored_anew(tmp_path, anchors, data, change):
    anchor = anchors["transformers"]
    options = ScoringOptions(batch_size=4, cache=tmp_path)
    other = WeightSet(anchor.tensors, {**anchor.meta, "preprocess": {**anchor.meta["preprocess"], **change}})
    for count, weights in ((1, anchor), (1, anchor), (2, other)):
        score(data, [weights], options=options)
        assert len(list(tmp_path.rglob("*.safetensors"))) == count
    with pytest.raises(WeightsError, match="with another preprocess"):
        score(data, [anchor, other])


def test_texts_that_are_not_read_to_their_end_are_one_notice_of_the_benchmark(anchors, data):
    weights = [near(anchors["transformers"], seed) for seed in (1, 2)]
    rows = [Row(name=w.source, identity=w.identity, kind="seed", members=(), options={}) for w in weights]
    found = collect(data, rows, score(data, weights), weights)
    framer = framer_of(weights[0].meta["preprocess"])
    long = sum(len(Tokenization(framer.tokenizer, "none", 999, 0, "longest")(text)) > LENGTH for text in TEXTS)
    assert 0 < long < len(TEXTS)
    expected = f"{long} of {len(TEXTS)} texts have more than {LENGTH} tokens; the rest of them is not read"
    assert found.notices == (f"reviews: {expected}",)


def test_images_for_a_text_tower_and_texts_for_an_image_tower_are_refused(tmp_path, anchors, data, anchor):
    make_split(tmp_path, "shapes", 4)
    with pytest.raises(WeightsError, match="got a tower for texts; expected one for the images"):
        score(open_dataset(tmp_path), [anchor, anchors["open_clip"]])
    for refused in (lambda: score(data, [anchor]), lambda: sample(data, anchor, examples=2)):
        with pytest.raises(WeightsError, match="got a tower for images; expected one for the texts of"):
            refused()


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", KINDS)
def test_speeds_are_measured_on_tokens_of_the_vocabulary_that_do_not_fill_up(
    anchors, kind, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(precision, "_SECONDS", 0.01)
    model = build_classifier(anchors[kind])
    tokens = precision._tokens(anchors[kind], model.tower, 500)
    pad, length = (anchors[kind].meta["preprocess"][name] for name in ("pad", "length"))
    assert tokens.shape == (500, length)
    tensors = anchors[kind].tensors
    names = ("text.transformer.embeddings.word_embeddings.weight", "text.token_embedding.weight")
    (vocabulary,) = [len(tensors[name]) for name in names if name in tensors]
    assert set(tokens.unique().tolist()) <= set(range(vocabulary)) - {pad}
    assert set(speeds(anchors[kind], "cpu", batch_size=4)) == {"float32", "bfloat16"}
    fastest(anchors[kind], "cpu", batch_size=4, kept=tmp_path)
    assert "texts per second" in capsys.readouterr().out
    (kept,) = tmp_path.iterdir()
    assert set(json.loads(kept.read_text())) == {"precision", "texts per second"}


@pytest.mark.parametrize("kind", KINDS)
def test_towers_in_bfloat16_score_nearly_the_same(anchors, data, kind):
    found = [
        score(data, [anchors[kind]], options=ScoringOptions(batch_size=8, precision=name))[anchors[kind].identity].nll
        for name in ("float32", "bfloat16")
    ]
    assert (found[0] != found[1]).any()
    np.testing.assert_allclose(*found, atol=0.1)


# ---------------------------------------------------------------- statistics


def test_a_sample_is_what_the_framer_makes_of_texts(anchors, data):
    framed, labels = sample(data, anchors["transformers"], examples=1000)
    framer = framer_of(anchors["transformers"].meta["preprocess"])
    assert [tokens.tolist() for tokens in framed] == [framer(text).tolist() for text in TEXTS]
    assert labels.tolist() == LABELS
    some, of_some = sample(data, anchors["transformers"], examples=5)
    assert (len(some), len(of_some)) == (5, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_mean_squared_gradient_of_log_p_of_one_text_at_a_time(anchors, data, kind):
    weights = near(anchors[kind], 4)
    texts, _ = sample(data, weights, examples=6)
    found = fisher(weights, texts, seed=5)
    model, generator = build_classifier(weights), torch.Generator().manual_seed(5)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for tokens in texts:
        model.zero_grad()
        filled = framer_of(weights.meta["preprocess"]).batch([tokens])
        log_p = model.logits(model.tower(filled)).log_softmax(dim=1)[0]
        log_p[torch.multinomial(log_p.detach().exp(), 1, generator=generator)].backward()
        for name, p in model.named_parameters():
            total[name] += p.grad**2 / len(texts)
    assert found.tensors.keys() == total.keys()
    for name, expected in total.items():
        np.testing.assert_allclose(found.tensors[name], expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_inner_products_of_an_encoder_count_no_token_that_fills_up(anchors, data):
    weights = anchors["transformers"]
    texts, _ = sample(data, weights, examples=100)
    assert len({len(tokens) for tokens in texts}) > 2
    found = inner(weights, texts, batch_size=3)
    names = {n for n, t in weights.tensors.items() if t.ndim == 2 and "embeddings" not in n}
    assert set(found.tensors) == names  # all matrices but the embeddings
    model, total = build_classifier(weights), dict.fromkeys(names, 0.0)

    def adding(name):
        def hook(_, args):
            rows = args[0].flatten(0, -2).double()
            total[name] = total[name] + (rows.T @ rows).numpy() / len(texts)

        return hook

    for name in names:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(adding(name))
    with torch.no_grad():
        for tokens in texts:
            model(torch.from_numpy(tokens)[None])
    for name, expected in total.items():
        np.testing.assert_allclose(found.tensors[name], expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("kind", ["open_clip", "without mask"])
def test_inner_products_of_open_clips_attention_are_those_under_its_mask(anchors, data, kind):
    """What out_proj gives must fit the inputs that we claim: the sum of its squared outputs is tr(W G W^T)."""
    weights = near(anchors[kind], 4)
    texts, _ = sample(data, weights, examples=100)
    found = inner(weights, texts, batch_size=3)
    model, name = build_classifier(weights), "text.transformer.resblocks.1.attn"
    module, squares, inputs = model.get_submodule(name), [], []
    module.register_forward_hook(lambda _, args, out: squares.append(((out[0] - module.out_proj.bias) ** 2).sum()))
    module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for tokens in texts:
            model(framer_of(weights.meta["preprocess"]).batch([tokens]))
    rows = torch.cat(inputs).double()
    np.testing.assert_allclose(
        found.tensors[f"{name}.in_proj_weight"], rows.T @ rows / len(texts), rtol=1e-4, atol=1e-5
    )
    weight, gram = module.out_proj.weight.double().detach().numpy(), found.tensors[f"{name}.out_proj.weight"]
    np.testing.assert_allclose(len(texts) * np.trace(weight @ gram @ weight.T), float(sum(squares)), rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losss_gradient_is_that_of_the_mean_over_single_texts(anchors, data, kind):
    texts, labels = sample(data, anchors[kind], examples=100)
    value, slopes = loss_gradient(texts, labels, batch_size=5)(anchors[kind])
    model = build_classifier(anchors[kind])
    framer = framer_of(anchors[kind].meta["preprocess"])
    logits = torch.cat([model.logits(model.tower(framer.batch([tokens]))) for tokens in texts])
    loss = functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    assert value == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(
            slopes[name], parameter.grad, atol=1e-5 * max(1e-3, float(parameter.grad.abs().max()))
        )


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_every_merge_that_weighs_by_data_takes_text_towers(anchors, data, kind):
    anchor = anchors[kind]
    tuned = [near(anchor, seed) for seed in (1, 2)]
    texts, labels = sample(data, anchor, examples=8)
    for method, given in {
        "fisher": {"statistics": [fisher(w, texts) for w in tuned]},
        "regmean": {"statistics": [inner(w, texts) for w in tuned]},
        "oracle_scales": {"gradient": loss_gradient(texts, labels), "iterations": 2},
        "model_stock": {},
    }.items():
        merged, report = merge_with(method, anchor, tuned, **given)
        assert score(data, [merged])[merged.identity].correct.shape == (len(TEXTS),), method
        assert set(report) == {n for n, v in anchor.tensors.items() if v.dtype.kind == "f"}


# ---------------------------------------------------------------- classifiers


def test_a_classifier_of_texts_gives_the_probabilities_that_scoring_has(anchors, data):
    for weights in anchors.values():
        classifier = classifier_of(weights, batch_size=3)
        assert isinstance(classifier, TextClassifier)
        assert classifier.labels == ("bad", "good")
        shares = classifier.probabilities(TEXTS)
        outcome = score(data, [weights])[weights.identity]
        np.testing.assert_array_equal(shares.argmax(axis=1), outcome.prediction)
        np.testing.assert_allclose(-np.log(shares[range(len(TEXTS)), LABELS]), outcome.nll, atol=1e-5)
        assert classifier.probabilities([]).shape == (0, 2)
    with pytest.raises(DataError, match="text 1: got a int; expected a text"):
        classifier.probabilities(["fine", 3])
    with pytest.raises(WeightsError, match="got a tower that takes text; expected one that takes image"):
        ImageClassifier(weights)


# ---------------------------------------------------------------- what messages say of tokenizers


def test_another_tokenizer_is_named_by_its_sha256(anchors, tmp_path, monkeypatch, capsys):
    anchor = anchors["transformers"]
    preprocess = anchor.meta["preprocess"]
    tokenizer = {**preprocess["tokenizer"], "sha256": "ab" * 32}
    other = near(anchor, 1, preprocess={**preprocess, "tokenizer": tokenizer, "length": 9})
    with pytest.raises(MergeError) as caught:
        check_parents(anchor, [other])
    digest = preprocess["tokenizer"]["sha256"][:12]
    assert f"another preprocessing (length, tokenizer sha256 {'ab' * 6}, not {digest})" in str(caught.value)
    assert preprocess["tokenizer"]["json"] not in str(caught.value)
    anchor.save(tmp_path / "w0.safetensors")
    monkeypatch.setattr(sys, "argv", ["modelstock", "inspect", str(tmp_path / "w0.safetensors"), "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out
    assert preprocess["tokenizer"]["sha256"] in shown
    assert preprocess["tokenizer"]["json"] not in shown


# ---------------------------------------------------------------- geometry


@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_tensors_of_text_towers_have_their_types_and_blocks(anchors, kind):
    found = groups({name: t.shape for name, t in anchors[kind].tensors.items()})
    kinds = {name: (group.kind, group.number, group.blocks) for name, group in found.items()}
    expected = {
        "transformers": {
            "text.transformer.embeddings.word_embeddings.weight": ("embedding", -1, 2),
            "text.transformer.embeddings.position_embeddings.weight": ("embedding", -1, 2),
            "text.transformer.embeddings.LayerNorm.weight": ("norm", -1, 2),
            "text.transformer.encoder.layer.0.attention.self.query.weight": ("attention weight", 0, 2),
            "text.transformer.encoder.layer.0.attention.self.key.bias": ("bias", 0, 2),
            "text.transformer.encoder.layer.0.attention.output.dense.weight": ("attention weight", 0, 2),
            "text.transformer.encoder.layer.1.attention.output.LayerNorm.bias": ("norm", 1, 2),
            "text.transformer.encoder.layer.1.intermediate.dense.weight": ("MLP weight", 1, 2),
            "text.transformer.encoder.layer.1.output.dense.weight": ("MLP weight", 1, 2),
        },
        "open_clip": {
            "text.token_embedding.weight": ("embedding", -1, 2),
            "text.positional_embedding": ("embedding", -1, 2),
            "text.transformer.resblocks.0.attn.in_proj_weight": ("attention weight", 0, 2),
            "text.transformer.resblocks.1.mlp.c_fc.weight": ("MLP weight", 1, 2),
            "text.ln_final.weight": ("norm", 2, 2),
        },
    }[kind]
    assert {name: kinds[name] for name in expected} == expected
    assert kinds["head.weight"] == ("head", 2, 2)


def test_the_geometry_of_encoders_has_no_nan_where_words_and_whole_tensors_never_moved(anchors, data):
    """Words that no text has do not move, nor do biases that softmax does not see; integers are no weights."""
    words, key = (
        "text.transformer.embeddings.word_embeddings.weight",
        "text.transformer.encoder.layer.0.attention.self.key.bias",
    )
    numbers = "text.transformer.embeddings.position_ids"

    def with_rest(weights, source):
        tensors = dict(weights.tensors)
        tensors[words] = np.concatenate([tensors[words][:9], anchors["transformers"].tensors[words][9:]])
        tensors[key] = anchors["transformers"].tensors[key]
        return WeightSet({**tensors, numbers: np.arange(32)}, weights.meta, source)

    anchor = with_rest(anchors["transformers"], "anchor")
    seeds = {}
    for seed in range(4):
        tuned = near(anchors["transformers"], seed, parents=[anchor.identity])
        seeds[seed] = with_rest(tuned, f"seed {seed}")
    opened = {seed: checkpoint_of(weights) for seed, weights in seeds.items()}
    found = measure(checkpoint_of(anchor), list(opened.values()))
    rows = {row["tensor"]: row for row in tensor_rows(found)}
    assert rows.keys() == anchor.tensors.keys() - {numbers}
    values = [
        value
        for row in [*rows.values(), *unit_rows(found, "type"), *unit_rows(found, "block")]
        for value in floats(row)
    ]
    assert np.isfinite(values).all()
    assert rows[key]["norm_mean"] == 0
    assert rows[words]["cosine_mean"] == pytest.approx(0, abs=0.3)
    chosen = points(Space(checkpoint_of(anchor), opened), GeometryParams(pairs=1))
    weights = [point.weights(anchor) for point in chosen]
    assert {"anchor", "seed-0", "model_stock/0-1"} <= {point.name for point in chosen}
    for one in weights:
        one.check_finite()
        np.testing.assert_array_equal(one.tensors[numbers], np.arange(32))
        np.testing.assert_array_equal(one.tensors[key], anchor.tensors[key])


def floats(value):
    """All numbers in nested facts."""
    if isinstance(value, dict):
        return [number for part in value.values() for number in floats(part)]
    if isinstance(value, list):
        return [number for part in value for number in floats(part)]
    return [value] if isinstance(value, float) else []


# ---------------------------------------------------------------- the command line


def test_the_commands_make_score_weigh_and_merge_text_towers(folder, tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_texts(tmp_path / "held-out", TEXTS, LABELS, benchmark="held-out", role="held-out")
    made = ["anchor", folder, "--library", "transformers", "--classes", "bad,good", "--templates", "a {} film"]
    made += ["--length", 12, "--device", "cpu"]

    def run(*words):
        code, output = command(monkeypatch, capsys, *words)
        assert code == 0, output.err
        return output

    run(*made, "--held-out", "held-out", "-o", "w0.safetensors")
    anchor = load_weights(tmp_path / "w0.safetensors")
    assert anchor.meta["preprocess"]["length"] == 12
    assert 1 <= anchor.meta["made_by"]["options"]["scale"] <= 1000
    for seed in (1, 2):
        near(anchor, seed).save(tmp_path / f"{seed}.safetensors")
    seeds = ["1.safetensors", "2.safetensors"]
    output = run("evaluate", *seeds, "--benchmark", data.folder, "--anchor", "w0.safetensors", "--json")
    rows = json.loads(output.out)
    assert [row["texts"] for row in (rows if isinstance(rows, list) else rows["rows"])] == [16, 16]
    assert output.err.count("have more than 12 tokens; the rest of them is not read") == 1
    output = run("evaluate", *seeds, "--benchmark", data.folder, "--precision", "bfloat16")
    assert "reviews: 16 texts" in output.out
    for seed in (1, 2):
        output = run(
            "statistics",
            "fisher",
            f"{seed}.safetensors",
            "--data",
            data.folder,
            "-o",
            f"{seed}.f.safetensors",
            "--examples",
            4,
        )
        assert "on 4 texts" in output.out
    by = ["--statistics", "1.f.safetensors", "--statistics", "2.f.safetensors"]
    run("merge", *seeds, "--anchor", "w0.safetensors", "--method", "fisher", *by, "-o", "f.safetensors")
    run(
        "merge",
        *seeds,
        "--anchor",
        "w0.safetensors",
        "--method",
        "greedy",
        "--held-out",
        "held-out",
        "-o",
        "g.safetensors",
    )
    output = run(
        "compare",
        *seeds,
        "--anchor",
        "w0.safetensors",
        "--benchmark",
        data.folder,
        "--benchmark",
        "held-out",
        "--method",
        "uniform",
        "-o",
        "out",
        "--device",
        "cpu",
    )
    assert "have more than 12 tokens" in (tmp_path / "out/report/comparison.md").read_text()
    assert (tmp_path / "out/report/comparison.html").stat().st_size < 5_000_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--library", "transformers"], "--length: got none; expected it, for transformers"),
        (
            ["x", "--library", "transformers", "--length", "8"],
            "--held-out: got none; expected shards, for the scale fitted",
        ),
        (
            ["x", "--library", "transformers", "--length", "8", "--pretrained", "tag"],
            "--pretrained: got 'tag'; expected random or",
        ),
        (["x", "--length", "8", "--pretrained", "random"], "--length: got 8; expected none for open_clip"),
        (["x"], "--pretrained: got none; expected it, for open_clip"),
        (["x", "--library", "timm", "--pretrained", "random"], "--train: got none; expected shards, for a probe"),
        (["x", "--library", "keras", "--pretrained", "random"], "--library: got 'keras'"),
        (["x", "--pretrained", "random", "--held-out", "d"], "--held-out: got d; expected none, for the scale model"),
        (
            ["x", "--tower", "text", "--pretrained", "random", "--clip-out", "c.safetensors"],
            "--clip-out: got c.safetensors; expected none",
        ),
        (["", "--library", "timm", "--pretrained", "random", "--train", "d", "--held-out", "d"], "model: got ''"),
        (["no/folder", "--library", "transformers", "--length", "8", "--held-out", "d"], "no such folder"),
    ],
)
def test_an_anchor_that_cannot_be_made_is_one_line(words, message, tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "d").symlink_to(data.folder)
    code, output = command(monkeypatch, capsys, "anchor", *words, "--classes", "bad,good", "-o", "w0.safetensors")
    assert (code, output.err.count("\n")) == (1, 1)
    assert message in output.err


def test_the_text_side_of_a_clip_is_an_anchor_by_the_command(tmp_path, data, monkeypatch, capsys):
    import open_clip

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "small", SMALL_CLIP)
    monkeypatch.chdir(tmp_path)
    words = [
        "anchor",
        "small",
        "--tower",
        "text",
        "--pretrained",
        "random",
        "--classes",
        "bad,good",
        "--templates",
        "{}",
    ]
    code, output = command(monkeypatch, capsys, *words, "-o", "w0.safetensors", "--length", 9)
    assert code == 0, output.err
    anchor = load_weights(tmp_path / "w0.safetensors")
    assert anchor.meta["preprocess"]["length"] == 9
    assert score(data, [anchor])[anchor.identity].correct.shape == (len(TEXTS),)


def test_commands_refuse_the_other_modality_in_one_line(tmp_path, anchors, anchor, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_split(tmp_path / "images", "shapes", 4)
    make_split(tmp_path / "held-out", "held-out", 4)
    anchors["transformers"].save(tmp_path / "texts.safetensors")
    for seed in (1, 2):
        near(anchors["transformers"], seed).save(tmp_path / f"{seed}.safetensors")
    anchor.save(tmp_path / "pictures.safetensors")
    texts, pictures = ["--benchmark", data.folder], ["--benchmark", "images", "--benchmark", "held-out"]
    seeds = ["1.safetensors", "2.safetensors", "--anchor", "texts.safetensors"]
    for words, tower in (
        (["evaluate", "texts.safetensors", *pictures], "texts"),
        (["evaluate", "pictures.safetensors", *texts], "images"),
        (["evaluate", "pictures.safetensors", *pictures, *texts], "images"),
        (["compare", *seeds, *pictures, "--method", "uniform", "-o", "out"], "texts"),
        (["statistics", "inner", "texts.safetensors", "--data", "images", "-o", "s.safetensors"], "texts"),
        (["statistics", "fisher", "pictures.safetensors", "--data", data.folder, "-o", "s.safetensors"], "images"),
        (["merge", *seeds, "--method", "greedy", "--held-out", "images", "-o", "m.safetensors"], "texts"),
        (["merge", *seeds, "--method", "oracle_scales", "--held-out", "images", "-o", "m.safetensors"], "texts"),
    ):
        code, output = command(monkeypatch, capsys, *words)
        errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (1, 1), (words, output.err)
        assert f"got a tower for {tower}; expected one for the" in errors[0], words
    assert not list(tmp_path.glob("[sm].safetensors"))
    code, output = command(
        monkeypatch, capsys, "export", "texts.safetensors", "--clip", "pictures.safetensors", "-o", "e"
    )
    assert (code, output.err.count("\n")) == (1, 1)
