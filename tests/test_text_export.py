"""Exports of text towers: folders that transformers and open_clip load and that predict as the weights do."""

import json
import logging

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from modelstock.cli.app import app
from modelstock.data.tokens import Tokenization
from modelstock.errors import WeightsError
from modelstock.models.adopt import adopt
from modelstock.models.anchor import text_anchor_of, with_head
from modelstock.models.export import export
from modelstock.models.text_towers import text_side
from modelstock.models.towers import build_classifier
from modelstock.weights.weight_set import WeightSet
from tests.support.models import clip_of
from tests.support.texts import LENGTH, SMALL_CLIP, encoder, encoder_folder, text_anchor

pytestmark = pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")
TEXTS = [
    "a good film",
    "The BAD plot was very very very very very very very very dull",
    "",
    "caf\u00e9 &amp; <b>fine</b>  n't . 'x' ?!",
    "it [SEP] is [MASK] so",
    "\u7535\u5f71 \U0001f600 silly\tactor\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder") / "published")


def classifier(folder, **options):
    """A weight set of an encoder with a head that tells texts apart, as if it were fine-tuned."""
    random = np.random.default_rng(0)
    bare = encoder(folder, **options)
    head = {"head.weight": random.normal(size=(3, 32)).astype(np.float32), "head.bias": np.zeros(3, np.float32)}
    weights = with_head(bare, ["bad", "good", "so so"], head, {"head": "probe"})
    # Random features are nearly all alike: with this bias, their small differences decide.
    bias = -expected_of(weights, TEXTS).mean(dim=0).numpy()
    return WeightSet({**weights.tensors, "head.bias": bias}, weights.meta, "tuned")


def example_of(folder, texts):
    """What the card's example leaves behind, run on these texts."""
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 17
    left: dict = {}
    exec(code.replace('["a text"]', repr(texts)), left)
    return left


def expected_of(weights, texts):
    framer = Tokenization.of(weights.meta["preprocess"])
    with torch.inference_mode():
        return build_classifier(weights)(framer.batch([framer(text) for text in texts]))


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("pooling", ["mean", "first", "pooler"])
def test_the_cards_example_gives_our_predictions(tmp_path, folder, monkeypatch, capsys, pooling, normalise):
    weights = classifier(folder, pooling=pooling, normalise=normalise)
    export(weights, None, tmp_path / "my model")
    monkeypatch.chdir(tmp_path)
    logits = example_of(tmp_path / "my model", TEXTS)["logits"]
    expected = expected_of(weights, TEXTS)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    names = [weights.meta["classes"][row] for row in expected.argmax(dim=1)]
    assert capsys.readouterr().out.strip() == str(names)
    assert len(set(names)) > 1


def test_transformers_loads_the_folder_without_missing_or_unexpected_tensors(tmp_path, folder, caplog):
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as theirs

    weights = classifier(folder)
    export(weights, None, tmp_path / "out")
    theirs.get_logger("transformers").addHandler(caplog.handler)
    with caplog.at_level(logging.INFO):
        model, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    theirs.get_logger("transformers").removeHandler(caplog.handler)
    assert not any(info.values()), info
    assert "newly initialized" not in caplog.text
    assert "MISSING" not in caplog.text
    assert model.dtype is torch.float32
    # The pooler is in no feature: zero, and so seen to be of no use.
    assert not any(tensor.any() for name, tensor in model.state_dict().items() if name.startswith("pooler."))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    framer = Tokenization.of(weights.meta["preprocess"])
    assert tokenizer.model_max_length == LENGTH
    for text in TEXTS:
        assert tokenizer(text, truncation=True)["input_ids"] == framer(text).tolist()
    assert tokenizer.pad_token_id == weights.meta["preprocess"]["pad"]
    assert (tokenizer.cls_token, tokenizer.sep_token, tokenizer.unk_token) == ("[CLS]", "[SEP]", "[UNK]")


def test_an_exported_folder_is_an_encoder_to_start_from(tmp_path, folder):
    weights = classifier(folder)
    export(weights, None, tmp_path / "out")
    again = encoder(tmp_path / "out")
    assert again.meta["preprocess"] == weights.meta["preprocess"]
    assert again.meta["architecture"] == weights.meta["architecture"]
    for name, tensor in again.tensors.items():
        np.testing.assert_array_equal(tensor, weights.tensors[name])
    with pytest.raises(WeightsError, match="a pooler of zeros"):
        encoder(tmp_path / "out", pooling="pooler")


def test_an_exported_folder_is_adopted_with_its_head(tmp_path, folder):
    anchor = text_anchor(folder, ["bad", "good", "so so"])
    weights = WeightSet({n: t + 1 for n, t in anchor.tensors.items()}, anchor.meta, "tuned")
    export(weights, None, tmp_path / "out")
    assert adopt(tmp_path / "out", anchor).identity == weights.identity
    with pytest.raises(WeightsError, match="got other classes"):
        adopt(tmp_path / "out", text_anchor(folder, ["good", "bad", "so so"]))


def test_the_files_are_those_of_transformers_and_sentence_transformers(tmp_path, folder):
    weights = classifier(folder)
    for parent in ("one", "two"):
        export(weights, None, tmp_path / parent / "out", licence="mit")
    files, again = (
        {str(p.relative_to(out)): p.is_file() and p.read_bytes() for p in out.rglob("*")}
        for out in (tmp_path / "one/out", tmp_path / "two/out")
    )
    assert files == again
    assert sorted(files) == [
        *("1_Pooling", "1_Pooling/config.json", "2_Normalize", "README.md", "classes.json", "config.json"),
        *("head.safetensors", "model.safetensors", "modules.json", "sentence_bert_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    pooling = json.loads(files["1_Pooling/config.json"])
    assert [key for key, value in pooling.items() if value is True] == ["pooling_mode_mean_tokens"]
    assert [module["path"] for module in json.loads(files["modules.json"])] == ["", "1_Pooling", "2_Normalize"]
    export(classifier(folder, pooling="pooler", normalise=False), None, tmp_path / "pooler")
    assert not (tmp_path / "pooler/modules.json").exists()
    card = files["README.md"].decode()
    assert "library_name: transformers" in card
    assert "pipeline_tag: text-classification" in card
    assert str(folder.parent) not in card
    assert "terms of the training texts" in card


@pytest.mark.parametrize("length", [None, LENGTH])
@pytest.mark.parametrize("custom", [False, True])
def test_the_text_side_of_a_clip_goes_back_into_it(tmp_path, monkeypatch, capsys, custom, length):
    _, clip = clip_of({**SMALL_CLIP, "custom_text": custom})
    anchor = text_anchor_of(text_side(clip, length=length), ["bad", "good", "so so"], [lambda name: name])
    random = np.random.default_rng(0)
    tensors = {n: (t + 0.05 * random.normal(size=t.shape)).astype(np.float32) for n, t in anchor.tensors.items()}
    weights = WeightSet(tensors, {**anchor.meta, "parents": [anchor.identity]}, "tuned")
    export(weights, clip, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    left = example_of(tmp_path / "out", TEXTS)
    expected = expected_of(weights, TEXTS)
    torch.testing.assert_close(left["logits"], expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.strip() == str([anchor.meta["classes"][row] for row in expected.argmax(dim=1)])
    state = left["model"].state_dict()
    for name, tensor in clip.tensors.items():
        if name.startswith("visual."):
            np.testing.assert_array_equal(state[name].numpy(), tensor)
    _, other = clip_of({**SMALL_CLIP, "custom_text": custom}, seed=1)
    with pytest.raises(WeightsError, match="expected the ancestor of tuned"):
        export(weights, other, tmp_path / "other")


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_asks_for_a_clip_where_there_is_one_and_only_there(tmp_path, folder):
    classifier(folder).save(tmp_path / "a.safetensors")
    _, clip = clip_of(SMALL_CLIP)
    clip.save(tmp_path / "clip.safetensors")
    text_anchor_of(text_side(clip), ["bad", "good"], [lambda name: name]).save(tmp_path / "b.safetensors")
    done = run("export", tmp_path / "a.safetensors", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "AutoModel.from_pretrained" in done.output
    done = run("export", tmp_path / "a.safetensors", "-o", tmp_path / "no", "--clip", tmp_path / "clip.safetensors")
    assert done.exit_code != 0
    assert "expected none for a tower of transformers; leave it out" in str(done.exception)
    done = run("export", tmp_path / "b.safetensors", "-o", tmp_path / "no")
    assert done.exit_code != 0
    assert "--clip: got none" in str(done.exception)
    done = run("export", tmp_path / "b.safetensors", "-o", tmp_path / "yes", "--clip", tmp_path / "clip.safetensors")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "no").exists()


def test_a_text_tower_of_transformers_with_more_to_it_is_refused(tmp_path, folder):
    weights = classifier(folder)
    preprocess = {**weights.meta["preprocess"], "cleaning": "whitespace"}
    with pytest.raises(WeightsError, match="cleaning whitespace"):
        export(WeightSet(weights.tensors, {**weights.meta, "preprocess": preprocess}), None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
