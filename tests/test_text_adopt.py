"""Encoders that others fine-tuned with plain transformers: they merge, and predict as transformers itself computes."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from modelstock.data.tokens import Tokenization
from modelstock.errors import ParamsError, WeightsError
from modelstock.models.adopt import adopt
from modelstock.models.anchor import with_head
from modelstock.models.towers import TOWERS, build_classifier, kind_of
from modelstock.notices import Notice, collected
from modelstock.weights.weight_set import WeightSet
from tests.support.merging import merge_with
from tests.support.models import clip_of
from tests.support.texts import LENGTH, SMALL_CLIP, Sentences, clip_text_anchor, encoder, encoder_folder, text_anchor

DATA = Sentences(24)
pytestmark = pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder") / "published")


class MeanPooled(nn.Module):
    """What many write around AutoModel: the mean of the tokens, normalised, and a linear layer."""

    def __init__(self, encoder):
        super().__init__()
        self.model, self.classifier = encoder, nn.Linear(32, 2)

    def forward(self, **tokens):
        states, mask = self.model(**tokens).last_hidden_state, tokens["attention_mask"].unsqueeze(-1)
        return self.classifier(functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1))


def tokens_of(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(DATA.texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")


def fine_tuned(folder, kind, seed):
    """A model of plain transformers after a few steps of AdamW; evaluation mode."""
    from transformers import AutoModel, BertForSequenceClassification

    torch.manual_seed(seed)
    if kind == "pooler":
        model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    else:
        model = MeanPooled(AutoModel.from_pretrained(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokens = tokens_of(folder)
    for _ in range(4):
        functional.cross_entropy(logits_of(model, tokens), torch.from_numpy(DATA.labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits_of(model, tokens):
    out = model(**tokens)
    return getattr(out, "logits", out)


def logits(weights):
    """Logits of a weight set, as scoring computes them."""
    framer = Tokenization.of(weights.meta["preprocess"])
    with torch.inference_mode():
        return build_classifier(weights)(framer.batch([framer(text) for text in DATA.texts]))


@pytest.fixture(scope="module", params=["pooler", "mean"])
def tuned(request, folder, tmp_path_factory):
    """An anchor, two models that were fine-tuned from its encoder, and a file of each."""
    root, kind = tmp_path_factory.mktemp(request.param), request.param
    options = {"pooling": "pooler", "normalise": False} if kind == "pooler" else {}
    if kind == "pooler":  # no prompts name such a head's features: one from elsewhere, as a probe would be
        random = np.random.default_rng(0).normal(0, 0.02, (2, 32)).astype(np.float32)
        head = {"head.weight": random, "head.bias": np.zeros(2, np.float32)}
        anchor = with_head(encoder(folder, **options), ["bad", "good"], head, {"head": "probe"})
    else:
        anchor = text_anchor(folder)
    models = [fine_tuned(folder, kind, seed) for seed in (0, 1)]
    paths = []
    for seed, model in enumerate(models):
        if kind == "pooler":
            model.save_pretrained(root / f"seed-{seed}")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(folder / name, root / f"seed-{seed}")
            paths.append(root / f"seed-{seed}")
        elif seed == 0:
            paths.append(root / "mean-0.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, paths[-1])
        else:
            paths.append(root / "mean-1.bin")
            torch.save({"model_state_dict": model.state_dict(), "epoch": 4}, paths[-1])
    return anchor, models, paths, tokens_of(folder)


def test_an_adopted_encoder_gives_transformers_own_logits(tuned):
    anchor, models, paths, tokens = tuned
    for model, path in zip(models, paths, strict=True):
        weights = adopt(path, anchor)
        assert weights.tensors.keys() == anchor.tensors.keys()
        assert weights.meta["made_by"]["options"]["head"] == "own"
        with torch.inference_mode():
            expected = logits_of(model, tokens)
        torch.testing.assert_close(logits(weights), expected, rtol=0, atol=1e-5)
        assert logits(weights).argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()
        assert np.abs(weights.tensors["head.weight"] - anchor.tensors["head.weight"]).max() > 1e-4


def test_what_is_merged_of_them_predicts_as_transformers_with_the_merged_weights(tuned):
    anchor, models, paths, tokens = tuned
    merged, _ = merge_with("model_stock", anchor, [adopt(path, anchor) for path in paths])
    model = copy.deepcopy(models[0])
    state = model.state_dict()
    prefix = next(name for name in state if name.endswith("word_embeddings.weight")).partition("embeddings.")[0]
    names = {name: name.replace("text.transformer.", prefix).replace("head.", "classifier.") for name in merged.tensors}
    assert set(names.values()) - state.keys() == set()
    assert all("pooler" in name for name in state.keys() - set(names.values()))
    model.load_state_dict(state | {names[ours]: torch.from_numpy(tensor) for ours, tensor in merged.tensors.items()})
    with torch.inference_mode():
        expected = logits_of(model, tokens)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    assert logits(merged).argmax(dim=1).tolist() == expected.argmax(dim=1).tolist()
    assert (expected - logits_of(models[0], tokens)).abs().max() > 1e-3


def state_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("prefix", ["", "bert.", "model.", "0.auto_model.", "text.transformer.", "module.encoder."])
def test_an_encoder_is_found_under_whatever_prefix(tmp_path, folder, prefix):
    anchor = text_anchor(folder)
    path = tmp_path / "a.safetensors"
    save_file({prefix + name: tensor + 1 for name, tensor in state_of(folder).items()}, path)
    with collected() as notices:
        weights = adopt(path, anchor)
    for name, tensor in anchor.tensors.items():
        np.testing.assert_array_equal(weights.tensors[name], tensor + 1 if name.startswith("text.") else tensor)
    assert any("pooler.dense.bias" in line and "in no feature, left aside" in line for line in notices)
    assert any("no head in it that can be used: the anchor's is" in line for line in notices)
    assert weights.meta["notices"] == notices


def test_notices_say_which_features_a_head_is_taken_to_be_over_and_only_where_that_is_assumed(tuned):
    anchor, _, paths, _ = tuned
    with collected() as notices:
        adopt(paths[0], anchor)
    pooler = paths[0].is_dir()  # its config names the class of the model, and with it the head
    assert any("is taken as a layer over normalised mean features" in line for line in notices) is not pooler


def lines_of(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def refused(path, anchor, match):
    with pytest.raises((WeightsError, ParamsError), match=match) as error:
        adopt(path, anchor)
    return lines_of(error)


def checkpoint(folder, path, state):
    """A folder as Trainer leaves it: these tensors beside the encoder's config and tokenizer."""
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, path)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path / "model.safetensors")
    return path


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_head_over_other_features_than_the_anchors_is_refused(tmp_path, folder):
    state = {f"bert.{name}": tensor for name, tensor in state_of(folder).items()}
    head = {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.zeros(2)}
    path = checkpoint(folder, tmp_path / "c", state | head)
    edit(path / "config.json", architectures=["BertForSequenceClassification"])
    line = refused(path, text_anchor(folder), "a head over the encoder's pooler, not normalised")
    assert "set pretrain.pooling: pooler" in line or "pretrain.pooling: pooler and normalise: false" in line


@pytest.mark.parametrize("layer", ["pre_classifier", "classifier.dense", "head.dense"])
def test_a_head_of_several_layers_is_refused(tmp_path, folder, layer):
    last = "classifier.out_proj" if layer == "classifier.dense" else "classifier"
    state = {**state_of(folder), f"{layer}.weight": torch.ones(32, 32), f"{last}.weight": torch.ones(2, 32)}
    path = tmp_path / "a.safetensors"
    save_file(state, path)
    refused(path, text_anchor(folder), "under no name of a head|beside the encoder and its head")


def test_the_language_heads_of_an_encoder_are_no_heads_of_classes(tmp_path, folder):
    state = {f"bert.{name}": tensor for name, tensor in state_of(folder).items()}
    state |= {"cls.seq_relationship.weight": torch.ones(2, 32), "cls.predictions.bias": torch.ones(len(state))}
    save_file(state, tmp_path / "a.safetensors")
    anchor = text_anchor(folder)
    with pytest.warns(Notice, match="left aside"):
        weights = adopt(tmp_path / "a.safetensors", anchor)
    assert weights.meta["made_by"]["options"]["head"] == "anchor"


def test_another_tokenizer_is_refused_with_both_identities(tmp_path, folder):
    anchor = text_anchor(folder)
    path = checkpoint(folder, tmp_path / "c", state_of(folder))
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["good"], vocabulary["bad"] = vocabulary["bad"], vocabulary["good"]
    (path / "tokenizer.json").write_text(json.dumps(content))
    line = refused(path, anchor, "another tokenizer")
    assert anchor.meta["preprocess"]["tokenizer"]["sha256"][:12] in line
    assert "fine-tune with the anchor's tokenizer" in line


def test_the_same_tokenizer_saved_again_by_transformers_is_the_same(tmp_path, folder):
    from transformers import AutoTokenizer

    path = checkpoint(folder, tmp_path / "c", state_of(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=8)  # which leaves traces in what is saved
    tokenizer.save_pretrained(path)
    assert (path / "tokenizer.json").read_bytes() != (folder / "tokenizer.json").read_bytes()
    with pytest.warns(Notice):
        adopt(path, text_anchor(folder))


def test_another_size_of_the_vocabulary_is_refused_with_its_cure(tmp_path, folder):
    name = "embeddings.word_embeddings.weight"
    state = state_of(folder)
    state[name] = torch.cat([state[name], torch.zeros(3, 32)])
    save_file(state, tmp_path / "a.safetensors")
    line = refused(tmp_path / "a.safetensors", text_anchor(folder), f"{name} is ")
    assert "fine-tune with the anchor's tokenizer" in line


def test_an_encoder_of_the_same_shapes_that_computes_otherwise_is_refused(tmp_path, folder):
    path = checkpoint(folder, tmp_path / "c", state_of(folder))
    edit(path / "config.json", num_attention_heads=4)
    refused(path, text_anchor(folder), "num_attention_heads 4, the anchor's 2")
    path = tmp_path / "more.safetensors"
    save_file({**state_of(folder), "encoder.layer.2.output.dense.bias": torch.ones(32)}, path)
    refused(path, text_anchor(folder), "encoder.layer.2.output.dense.bias unknown")


def test_a_checkpoint_of_no_such_encoder_is_refused(tmp_path, folder):
    save_file({"transformer.wte.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", text_anchor(folder), "of the text tower's .* tensors missing")


@pytest.mark.parametrize("custom", [False, True])
def test_the_text_tower_of_a_whole_clip_is_taken_with_its_own_zero_shot_head(tmp_path, custom):
    config = {**SMALL_CLIP, "custom_text": custom}
    anchor = clip_text_anchor(length=LENGTH)
    model, clip = clip_of(config, seed=5)
    path = tmp_path / "clip.pt"
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in model.state_dict().items()}}, path)
    weights = adopt(path, anchor, prompts=[lambda name: name])
    assert weights.meta["made_by"]["options"]["head"] == "zero-shot"
    assert kind_of(weights) is TOWERS["open_clip-text"]
    for name in (name for name in anchor.tensors if name.startswith("text.")):
        np.testing.assert_array_equal(weights.tensors[name], clip.tensors[name if custom else name[len("text.") :]])
    tokens = open_clip.SimpleTokenizer(context_length=16)(["bad", "good"])
    with torch.inference_mode():
        rows = model.encode_text(tokens, normalize=True) * model.logit_scale.exp()
    np.testing.assert_allclose(weights.tensors["head.weight"], rows.numpy(), rtol=1e-4, atol=1e-5)
    with pytest.warns(Notice, match="no head in it"):
        assert adopt(path, anchor).meta["made_by"]["options"]["head"] == "anchor"


def test_a_weight_set_of_ours_stays_as_it_is(tmp_path, folder):
    anchor = text_anchor(folder)
    weights = WeightSet({n: t + 1 for n, t in anchor.tensors.items()}, {**anchor.meta, "parents": [anchor.identity]})
    weights.save(tmp_path / "seed.safetensors")
    assert adopt(Path(tmp_path / "seed.safetensors"), anchor).identity == weights.identity
