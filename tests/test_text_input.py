"""Encoders of transformers as they are published, and what is wrong with some: one line each, and nothing executed."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modelstock.errors import DataError, ModelstockError, ParamsError, WeightsError
from modelstock.models.text_towers import _plain_config
from modelstock.models.towers import ENCODERS, build_encoder
from modelstock.notices import Notice
from tests.support.texts import encoder, encoder_folder

pytestmark = pytest.mark.filterwarnings("ignore::modelstock.notices.Notice")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder") / "published")


@pytest.fixture
def folder(tmp_path, published):
    """A copy to be damaged."""
    return shutil.copytree(published, tmp_path / "encoder")


def edit(path, **values):
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refused(error, folder, match, **options):
    with pytest.raises(error, match=match) as caught:
        encoder(folder, **options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


# ---------------------------------------------------------------- what is taken


SMALL = {"vocab_size": 60, "num_attention_heads": 2, "intermediate_size": 48, "max_position_embeddings": 40}
SMALL |= {"hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 1}
OTHERS = {
    "albert": SMALL | {"embedding_size": 16},
    "electra": SMALL | {"embedding_size": 16},
    "deberta-v2": SMALL | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "modernbert": SMALL | {"global_attn_every_n_layers": 2, "local_attention": 4},
    "distilbert": {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48, "pad_token_id": 1},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ENCODERS)
def test_every_encoder_gives_transformers_own_states_pooled(kind):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(kind, **OTHERS.get(kind, SMALL))
    torch.manual_seed(0)
    plain = AutoModel.from_config(config).eval()
    tokens = torch.randint(5, 60, (3, 12))
    tokens[1, 7:] = tokens[2, 3:] = 1
    mask = (tokens != 1).long()
    with torch.inference_mode():
        out = plain(input_ids=tokens, attention_mask=mask)
    rows = [states[: int(length)] for states, length in zip(out.last_hidden_state, mask.sum(dim=1), strict=True)]
    expected = {
        "mean_pooler": torch.stack([row.mean(dim=0) for row in rows]),
        "cls_last_hidden_state_pooler": torch.stack([row[0] for row in rows]),
        "cls_pooler": out.get("pooler_output"),
    }
    for pooling, features in expected.items():
        architecture = {"config": _plain_config(config), "pooling": pooling, "width": 32}
        if features is None:
            with pytest.raises(ParamsError, match=f"pooling pooler for {kind}, which has none"):
                build_encoder(architecture)
            continue
        built = build_encoder(architecture).eval()
        tensors = {f"transformer.{name}": tensor for name, tensor in plain.state_dict().items()}
        built.load_state_dict({name: tensors[name] for name in built.state_dict()})
        with torch.inference_mode():
            torch.testing.assert_close(built(tokens), features, rtol=1e-5, atol=1e-5)


def test_an_encoder_with_a_projection_is_named_and_computes_as_open_clips():
    from open_clip.hf_model import HFTextEncoder
    from transformers import AutoConfig

    config = AutoConfig.for_model("roberta", **SMALL)
    for projection, width in (("linear", 8), ("mlp", 8), (None, 32)):
        torch.manual_seed(0)
        theirs = HFTextEncoder("", width, config, "mean_pooler", projection).eval()
        architecture = {"config": _plain_config(config), "pooling": "mean_pooler", "width": width}
        ours = build_encoder({**architecture, "projection": projection}).eval()
        unused = {name for name in theirs.state_dict() if ".pooler." in name}
        assert ours.state_dict().keys() == theirs.state_dict().keys() - unused
        ours.load_state_dict({name: theirs.state_dict()[name] for name in ours.state_dict()})
        tokens = torch.tensor([[5, 6, 7, 8], [9, 8, 1, 1]])
        with torch.inference_mode():
            torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "bert.", "0.auto_model."])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_found_under_whatever_prefix_and_in_pickles_of_tensors(folder, published, prefix, file):
    state = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    (torch.save if file.endswith("bin") else save_file)(state, folder / file)
    assert encoder(folder).identity == encoder(published).identity


def test_a_pooling_that_differs_from_the_published_one_is_a_notice(folder):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    )
    with pytest.warns(Notice, match="published with pooling first; it is mean here"):
        encoder(folder)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("config.json", "a folder without config.json"),
        ("model.safetensors", "a folder without model.safetensors.*pretrain.weights: random"),
        ("tokenizer.json", "a folder without tokenizer.json"),
    ],
)
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(folder, file, said):
    (folder / file).unlink()
    refused(DataError, folder, said)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": {"type": "WordPiece"}}', b"\xff\xfe\x00"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_refused_by_its_name(folder, file, content):
    (folder / file).write_bytes(content)
    if file == "tokenizer_config.json" and content.startswith(b'{"model"'):
        return  # any object is one
    refused(ModelstockError, folder, "pretrain.model|tokenizer of")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "gpt2"}, "got a model of type gpt2; expected an encoder .*: albert, bert"),
        ({"model_type": "t5"}, "got a model of type t5"),
        ({"model_type": "is-of-no-library"}, "is-of-no-library"),
        ({"is_decoder": True}, "a bert that is a decoder"),
        ({"pad_token_id": 4}, "a tokenizer that fills up with 0 for an encoder that masks 4"),
        ({"vocab_size": 20}, "a token .* for an encoder of 20 tokens"),
        ({"num_hidden_layers": 1}, "encoder.layer.1.* beside the encoder"),
        ({"num_hidden_layers": 3}, "tensors missing: encoder.layer.2"),
        ({"hidden_size": 16}, r"is \(.*32\), not"),
        ({"max_position_embeddings": 8}, "pretrain.length: got 12; expected at most 8"),
    ],
)
def test_a_config_of_another_model_is_refused(folder, values, said):
    edit(folder / "config.json", **values)
    refused(ModelstockError, folder, said)


def test_positions_that_are_counted_from_the_padding_are_not_to_be_had(tmp_path, folder):
    edit(folder / "config.json", model_type="roberta", max_position_embeddings=12, pad_token_id=0)
    refused(ParamsError, folder, "got 12; expected at most 11", weights="random")
    assert encoder(folder, weights="random", length=11).meta["preprocess"]["length"] == 11


def test_a_tokenizer_without_padding_or_end_is_refused(folder):
    edit(folder / "tokenizer_config.json", pad_token=None)
    refused(ParamsError, folder, "one without a token that fills up")
    edit(folder / "tokenizer_config.json", pad_token="[PAD]")
    edit(folder / "tokenizer.json", post_processor=None)
    refused(ParamsError, folder, "does not end a text with one token")


def test_a_pooler_that_is_not_in_the_file_is_refused(folder):
    state = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in state.items() if "pooler" not in n}, folder / "model.safetensors")
    refused(WeightsError, folder, "no pooler.*set pretrain.pooling", pooling="pooler")


class _Touch:
    """What a malicious file would do: here, make a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_nothing_that_comes_with_a_model_is_executed(tmp_path, folder):
    code = f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    (folder / "modeling_mine.py").write_text(code)
    names = {"AutoConfig": "modeling_mine.Config", "AutoModel": "modeling_mine.Model"}
    edit(folder / "config.json", auto_map=names)
    refused(ParamsError, folder, "its own code .auto_map in config.json., which is not executed")
    edit(folder / "config.json", auto_map=None)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_mine.Model", None]})
    refused(ParamsError, folder, "auto_map in tokenizer_config.json")
    edit(folder / "tokenizer_config.json", auto_map=None)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": _Touch(tmp_path / "executed")}))
    refused(WeightsError, folder, "nothing in it is executed")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- without a network


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("HF_HUB_OFFLINE", True, "OfflineModeIsEnabled"),
        (
            "HUGGINGFACE_CO_URL_TEMPLATE",
            "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
            "Connection refused",
        ),
    ],
)
def test_a_name_on_the_hub_without_network_says_which_files_to_put_where(monkeypatch, setting, value, said):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, setting, value)
    line = refused(DataError, "nobody/no-such-encoder", said)
    assert "pretrain.model nobody/no-such-encoder: got no such folder, and it cannot be had from the hub" in line
    assert "expected config.json, model.safetensors, tokenizer.json, tokenizer_config.json" in line
    assert "copy these files to a folder, and set pretrain.model to it" in line


def test_of_the_cache_a_snapshot_without_weights_is_not_enough(tmp_path, folder, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(model, *, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        if not local_files_only:
            raise OSError("no network")
        (folder / "model.safetensors").unlink(missing_ok=True)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: type("", (), {"head": lambda *_, **__: None})())
    refused(DataError, "somebody/an-encoder", "cannot be had from the hub .OSError: no network")
    assert asked == [True, False]


def test_random_weights_are_those_of_their_seed(folder):
    (folder / "model.safetensors").unlink()
    one, same, other = (encoder(folder, weights="random", seed=seed) for seed in (1, 1, 2))
    assert one.identity == same.identity
    assert np.abs(one.tensors["text.transformer.embeddings.word_embeddings.weight"]).max() > 0
    assert one.identity != other.identity
