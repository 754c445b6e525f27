"""Anchors from open_clip's models, and other people's checkpoints as weight sets that merge with one."""

import copy
import json
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from modelstock import provenance
from modelstock.data.classes import templates
from modelstock.errors import DataError, ParamsError, WeightsError
from modelstock.experiment.rows import row_of
from modelstock.models import anchor as anchors
from modelstock.models import heads, pretrained
from modelstock.models import towers as models
from modelstock.models.adopt import adopt, adopt_seed
from modelstock.models.anchor import anchor_of
from modelstock.models.pretrained import load_clip
from modelstock.notices import Notice
from modelstock.params import AnchorParams, ClassesParams, OpenClipPretraining
from modelstock.weights.origin import made_by
from modelstock.weights.weight_set import WeightSet, classes_sha256, load_weights
from tests.support.merging import merge_with
from tests.support.models import CONFIGS, TEXT, TINY, clip_of, folder_of

PROMPTS = templates(ClassesParams(names=["cat", "dog"], templates=["a photo of a {}.", "{}"]))


@pytest.fixture
def tiny(monkeypatch):
    """The tiny architecture under a name of its own among open_clip's."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", TINY)
    return "ViT-tiny"


@pytest.fixture
def own_anchor():
    return anchor_of(clip_of(TINY)[1], ["cat", "dog"], PROMPTS)


# --- towers


@pytest.mark.parametrize(
    ("name", "kind"),
    [("CLIP", "CLIP"), ("CustomTextCLIP", "CustomTextCLIP"), ("CoCa", "CoCa"), ("a ViT of timm", "CLIP")],
)
def test_a_config_becomes_the_class_that_open_clip_makes_of_it(name, kind, monkeypatch):
    model = models.build_clip(CONFIGS[name])
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "mine", copy.deepcopy(CONFIGS[name]))
    theirs = open_clip.create_model("mine")
    assert type(model).__name__ == type(theirs).__name__ == kind
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_classifier_has_the_logits_of_the_model_its_weights_came_from(name):
    config = CONFIGS[name]
    clip, weights = clip_of(config)
    width = config["embed_dim"]
    head = torch.randn(5, width, generator=torch.Generator().manual_seed(1))
    tensors = {k: v for k, v in weights.tensors.items() if k.startswith("visual.")}
    tensors |= {"head.weight": head.numpy(), "head.bias": np.arange(5, dtype=np.float32)}
    before = torch.get_rng_state()
    classifier = models.build_classifier(WeightSet(tensors, weights.meta))
    assert torch.equal(torch.get_rng_state(), before)
    size = clip.visual.image_size
    side = size[0] if isinstance(size, tuple) else size
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        features = clip.encode_image(images, normalize=True)
        torch.testing.assert_close(classifier(images), features @ head.T + torch.arange(5.0), rtol=0, atol=1e-5)
    assert not [n for n, t in [*classifier.named_parameters(), *classifier.named_buffers()] if t.is_meta]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_of_a_model_with_random_weights_is_drawn_by_the_callers_seed(name, monkeypatch):
    empty, dirt = torch.empty, [0.0]

    def dirty(*size, **options):
        """torch.empty over memory that was used before."""
        tensor = empty(*size, **options)
        return tensor.fill_(dirt[0]) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", dirty)
    built = []
    for dirt[0] in (float("nan"), 7.0):
        assert torch.empty(1).item() == pytest.approx(dirt[0], nan_ok=True)
        torch.manual_seed(3)
        built.append(models.build_clip(CONFIGS[name]).state_dict())
    first, second = built
    assert [key for key, tensor in first.items() if not torch.isfinite(tensor).all()] == []
    assert [key for key, tensor in first.items() if not torch.equal(tensor, second[key])] == []


def test_a_cocas_text_projection_is_drawn_as_open_clip_means_it_to_be():
    torch.manual_seed(0)
    projection = models.build_clip(CONFIGS["CoCa"]).text_decoder.text_projection.detach()
    assert projection.shape == (64, TEXT["vocab_size"])
    assert projection.std().item() == pytest.approx(64**-0.5, rel=0.01)


def test_an_image_tower_of_real_size_is_built_without_a_text_tower():
    with torch.device("meta"):
        tower = models.build_visual(open_clip.get_model_config("ViT-B-32-quickgelu"))
    assert sum(p.numel() for p in tower.parameters()) == 87_849_216
    assert type(tower.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


# --- zero-shot heads


def test_a_head_is_the_mean_of_normalised_texts_and_repeated_prompts_are_encoded_once():
    clip, _ = clip_of(TINY)
    seen: list[str] = []

    def tokenize(texts):
        seen.extend(texts)
        return heads.tokenizer(TINY)(texts)

    prompts = [*PROMPTS, lambda name: name, lambda name: "thing"]
    weight, bias = heads.zero_shot_head(clip, tokenize, ["cat", "dog"], prompts)
    assert seen == ["a photo of a cat.", "cat", "thing", "a photo of a dog.", "dog"]
    for row, name in enumerate(["cat", "dog"]):
        texts = open_clip.tokenize([f"a photo of a {name}.", name, name, "thing"], context_length=16)
        with torch.inference_mode():
            features = functional.normalize(clip.encode_text(texts), dim=-1).mean(dim=0)
            expected = features / features.norm() * clip.logit_scale.exp()
        torch.testing.assert_close(weight[row], expected, rtol=1e-4, atol=1e-4)
    assert bias.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["CLIP", "CustomTextCLIP", "CoCa"])
def test_zero_shot_logits_are_those_of_the_clip_and_float32_also_of_half_towers(name):
    clip, weights = clip_of(CONFIGS[name])
    anchor = anchor_of(weights, ["cat", "dog"], PROMPTS[:1])
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = models.build_classifier(anchor)(images)
        texts = heads.tokenizer(CONFIGS[name])(["a photo of a cat.", "a photo of a dog."])
        expected = clip.encode_image(images, normalize=True) @ clip.encode_text(texts, normalize=True).T
        torch.testing.assert_close(logits, clip.logit_scale.exp() * expected, rtol=1e-4, atol=1e-4)
    half, _ = heads.zero_shot_head(clip.bfloat16(), heads.tokenizer(CONFIGS[name]), ["cat", "dog"], PROMPTS[:1])
    assert half.dtype == torch.float32
    np.testing.assert_allclose(half.numpy(), anchor.tensors["head.weight"], atol=0.5)
    np.testing.assert_allclose(half.norm(dim=1), 1 / 0.07, rtol=2e-2)


def test_a_head_is_cached_by_text_tower_and_prompts_and_a_damaged_cache_is_made_again(tmp_path, monkeypatch):
    _, weights = clip_of(TINY)
    first = anchor_of(weights, ["cat", "dog"], PROMPTS, cache=tmp_path)
    (cached,) = tmp_path.iterdir()
    assert len(cached.stem) == 24

    def never(*_):
        raise AssertionError("encoded again")

    with monkeypatch.context() as patch:
        patch.setattr(anchors, "zero_shot_head", never)
        again = anchor_of(weights, ["cat", "dog"], PROMPTS, cache=tmp_path)
        assert again.identity == first.identity
        for change in [
            lambda: anchor_of(weights, ["cat", "cow"], PROMPTS, cache=tmp_path),
            lambda: anchor_of(weights, ["cat", "dog"], PROMPTS[:1], cache=tmp_path),
            lambda: anchor_of(clip_of(TINY, seed=1)[1], ["cat", "dog"], PROMPTS, cache=tmp_path),
            lambda: anchor_of(clip_of(CONFIGS["QuickGELU"])[1], ["cat", "dog"], PROMPTS, cache=tmp_path),
        ]:
            with pytest.raises(AssertionError, match="encoded again"):
                change()
    cached.write_bytes(cached.read_bytes()[:-1])
    assert anchor_of(weights, ["cat", "dog"], PROMPTS, cache=tmp_path).identity == first.identity
    assert load_weights(cached).tensors["head.weight"].shape == (2, 128)


@pytest.mark.parametrize("change", ["nothing", "another open_clip", "another line of code", "more threads"])
def test_a_cached_head_is_used_only_as_long_as_the_code_and_libraries_that_made_it(tmp_path, monkeypatch, change):
    _, weights = clip_of(TINY)
    encoded = []

    def spy(*arguments):
        encoded.append(arguments)
        return heads.zero_shot_head(*arguments)

    monkeypatch.setattr(anchors, "zero_shot_head", spy)
    anchor_of(weights, ["cat", "dog"], PROMPTS, cache=tmp_path / "heads")
    if change == "another open_clip":
        version = provenance._version
        monkeypatch.setattr(provenance, "_version", lambda name: "4.0" if name == "open_clip_torch" else version(name))
    elif change == "another line of code":
        changed, files_of = tmp_path / "heads.py", provenance.files_of
        changed.write_text(Path(heads.__file__).read_text() + "# another line\n")
        monkeypatch.setattr(
            provenance, "files_of", lambda m: [changed if f.samefile(heads.__file__) else f for f in files_of(m)]
        )
    elif change == "more threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    anchor_of(weights, ["cat", "dog"], PROMPTS, cache=tmp_path / "heads")
    assert len(encoded) == (1 if change == "nothing" else 2)


def test_an_anchor_says_what_it_is(tmp_path):
    _, clip = clip_of(TINY)
    clip.save(tmp_path / "clip.safetensors")
    anchor = anchor_of(load_weights(tmp_path / "clip.safetensors"), ["cat", "dog"], PROMPTS)
    anchor.save(tmp_path / "anchor.safetensors")
    meta = load_weights(tmp_path / "anchor.safetensors").meta
    assert meta["classes"] == ["cat", "dog"]
    assert meta["classes_sha256"] == classes_sha256(["cat", "dog"])
    assert meta["backbone"] == {"name": "tiny", "pretrained": "random"}
    assert meta["parents"] == [meta["clip"]] == [clip.identity]
    assert {n for n in anchor.tensors if not n.startswith("visual.")} == {"head.weight", "head.bias"}
    with pytest.raises(WeightsError, match="without architecture or text tower"):
        anchor_of(anchor, ["cat", "dog"], PROMPTS)


# --- loading


def test_random_weights_repeat_by_seed_and_leave_the_generator_alone(tiny):
    torch.manual_seed(9)
    before = torch.get_rng_state()
    one, same, other = (load_clip(tiny, "random", seed=seed) for seed in (3, 3, 4))
    assert one.identity == same.identity != other.identity
    assert torch.equal(torch.get_rng_state(), before)
    assert one.meta["backbone"] == {"name": "ViT-tiny", "pretrained": "random"}
    assert one.meta["preprocess"] == {
        "size": 32,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    json.dumps(dict(one.meta))


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "form",
    ["training checkpoint", "tutorial", "compiled", "index", "state dict", "safetensors", "TorchScript", "half"],
)
def test_every_form_of_file_gives_the_same_weights(tmp_path, tiny, form):
    model, expected = clip_of(TINY)
    state = model.state_dict()
    path = tmp_path / "clip.pt"
    if form == "training checkpoint":
        prefixed = {f"module.{k}": v for k, v in state.items()}
        torch.save({"epoch": 3, "name": "run", "state_dict": prefixed, "optimizer": {"state": {}}}, path)
    elif form == "tutorial":
        torch.save({"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {}}, path)
    elif form == "compiled":
        path = path.with_suffix(".safetensors")
        save_file({f"_orig_mod.{k}": v for k, v in state.items()}, path)
    elif form == "index":
        path = tmp_path / "folder"
        path.mkdir()
        save_file(state, path / "part.safetensors")
        index = {"weight_map": dict.fromkeys(state, "part.safetensors")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif form == "state dict":
        torch.save(state, path)
    elif form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(state, path)
    elif form == "TorchScript":
        example = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.int64)
        torch.jit.trace(model, example, check_trace=False).save(str(path))
    else:
        state = {k: v.half() for k, v in state.items()}
        expected = WeightSet({k: v.float().numpy() for k, v in state.items()})
        torch.save(state, path)
    found = load_clip(tiny, path)
    assert found.identity == expected.identity
    assert {t.dtype for t in found.tensors.values()} == {np.dtype("float32")}


def test_a_folder_brings_its_own_architecture_and_preprocessing(tmp_path):
    model, expected = clip_of(CONFIGS["QuickGELU"])
    folder = folder_of(
        tmp_path / "clip",
        model.state_dict(),
        CONFIGS["QuickGELU"],
        mean=[0.5, 0.5, 0.5],
        std=[0.5, 0.5, 0.5],
        resize_mode="squash",
        size=99,
    )
    # Another library's form of the same model lies beside it in many repositories.
    save_file({"blocks.0.weight": torch.zeros(1)}, folder / "model.safetensors")
    by_folder = load_clip("anything", folder)
    by_file = load_clip("anything", folder / "open_clip_model.safetensors")
    assert by_folder.identity == by_file.identity == expected.identity
    assert by_folder.meta["architecture"]["quick_gelu"] is True
    assert by_folder.meta["preprocess"] == {
        "size": 32,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }


def test_a_folder_that_is_not_what_its_name_means_to_open_clip_is_warned_of(tmp_path, tiny):
    model, _ = clip_of(CONFIGS["QuickGELU"])
    folder = folder_of(tmp_path / "clip", model.state_dict(), CONFIGS["QuickGELU"])
    with pytest.warns(UserWarning, match="not ViT-tiny of open_clip: quick_gelu differ"):
        assert load_clip(tiny, folder).meta["architecture"]["quick_gelu"] is True


def test_a_file_without_config_is_preprocessed_as_all_published_weights_of_its_architecture(tmp_path, monkeypatch):
    said = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "SigLIP-tiny", TINY)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "SigLIP-tiny", {"a": said, "b": dict(said)})
    torch.save(clip_of(TINY)[0].state_dict(), tmp_path / "clip.pt")
    assert load_clip("SigLIP-tiny", tmp_path / "clip.pt").meta["preprocess"]["resize_mode"] == "squash"
    open_clip.pretrained._PRETRAINED["SigLIP-tiny"]["b"] = {**said, "mean": (0.1,) * 3}
    with pytest.warns(UserWarning, match="published with 2 ways of preprocessing"):
        found = load_clip("SigLIP-tiny", tmp_path / "clip.pt").meta["preprocess"]
    assert found["resize_mode"] == "shortest"


def test_a_tag_is_loaded_with_its_own_preprocessing(tmp_path, monkeypatch, tiny):
    model, expected = clip_of(TINY)
    torch.save(model.state_dict(), tmp_path / "clip.pt")
    tag = {"file": str(tmp_path / "clip.pt"), "mean": (0.5,) * 3, "std": (0.5,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny, {"web_li": tag})
    found = load_clip(tiny, "web-li")
    assert found.identity == expected.identity
    assert found.meta["backbone"] == {"name": tiny, "pretrained": "web-li"}
    assert [found.meta["preprocess"][k] for k in ("mean", "resize_mode")] == [[0.5] * 3, "squash"]


@pytest.mark.parametrize(("trained", "built"), [(True, False), (False, True)])
def test_weights_of_another_activation_are_warned_of_with_the_right_architecture(tmp_path, monkeypatch, trained, built):
    torch.save(clip_of(TINY)[0].state_dict(), tmp_path / "Tiny.pt")
    names = {False: "T", True: "T-quickgelu"}
    for flag, name in names.items():
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**TINY, "quick_gelu": flag})
        tag = {"file": str(tmp_path / "Tiny.pt"), "url": "https://host/Tiny.pt", "quick_gelu": trained}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"tag": tag})
    with pytest.warns(UserWarning, match=f"set pretrain.architecture to {names[trained]}$"):
        load_clip(names[built], "tag")
    with pytest.warns(UserWarning, match=rf"Tiny\.pt: .*set pretrain.architecture to {names[trained]}$"):
        load_clip(names[built], tmp_path / "Tiny.pt")


@pytest.mark.parametrize("built", ["T", "T-quickgelu"])
def test_a_file_of_unknown_origin_whose_published_relatives_have_another_activation_is_a_notice(
    tmp_path, monkeypatch, built
):
    torch.save(clip_of(TINY)[0].state_dict(), tmp_path / "epoch_1.pt")
    tags = {"openai": {"quick_gelu": True}, "laion": {"quick_gelu": False}}
    for name in ("T", "T-quickgelu"):
        config = {**TINY, **({"quick_gelu": True} if name != "T" else {})}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
    other, tag = ("T-quickgelu", "openai") if built == "T" else ("T", "laion")
    line = (
        rf"epoch_1\.pt: built with \w+, as {built} says, while 1 of its 2 published weights \({tag}\) .* name {other},"
    )
    with pytest.warns(Notice, match=line):
        found = load_clip(built, tmp_path / "epoch_1.pt")
    anchor = anchor_of(found, ["cat", "dog"], PROMPTS)
    assert anchor.meta["notices"] == found.meta["notices"] != []


def test_weights_of_the_right_activation_are_not_warned_of(tmp_path, recwarn):
    tag = open_clip.pretrained.get_pretrained_cfg("ViT-B-32-quickgelu", "openai")
    config = open_clip.get_model_config("ViT-B-32-quickgelu")
    pretrained._check_activation("ViT-B-32-quickgelu", config, "openai", tag)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("architecture", "pretrained", "message"),
    [
        ("ViT-B32", "openai", r"pretrain\.architecture: got 'ViT-B32'.*did you mean ViT-B-32"),
        ("ViT-B-32", "openay", r"pretrain\.pretrained: got 'openay'.*did you mean openai\?"),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "laion2b_s34b_b79k is of ViT-B-32"),
        ("ViT-B-32", "missing.pt", "got 'missing.pt'; expected a tag of ViT-B-32, a file, a folder, or random"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(architecture, pretrained, message):
    with pytest.raises(ParamsError, match=message):
        load_clip(architecture, pretrained)


def test_without_a_network_the_file_to_bring_is_named_at_once(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", lambda *_: "http://127.0.0.1:9/nothing")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        load_clip("ViT-B-32-quickgelu", "openai")
    assert time.monotonic() - start < 10
    for part in (
        "open_clip_model.safetensors",
        "timm/vit_base_patch32_clip_224.openai",
        "ViT-B-32.pt",
        "set pretrain.pretrained: PATH",
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_weights_in_the_hubs_cache_need_no_network(tmp_path, monkeypatch, tiny):
    import huggingface_hub

    model, expected = clip_of(TINY)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny, {"tag": {"hf_hub": "some/where/"}})

    def cached(repository, name):
        assert repository == "some/where"
        return str(tmp_path / name) if name.endswith(".bin") else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert load_clip(tiny, "tag").identity == expected.identity


def test_a_file_of_another_architecture_or_none_is_refused_by_name(tmp_path, tiny):
    state = clip_of(TINY)[0].state_dict()
    torch.save({**state, "visual.proj": torch.zeros(3, 3)}, tmp_path / "shape.pt")
    with pytest.raises(WeightsError, match=r"visual.proj is \(3, 3\), the architecture's \(128, 128\)"):
        load_clip(tiny, tmp_path / "shape.pt")
    torch.save({k: v for k, v in state.items() if k != "visual.proj"}, tmp_path / "less.pt")
    with pytest.raises(WeightsError, match=r"visual\.proj missing"):
        load_clip(tiny, tmp_path / "less.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\x00" * 50)
    with pytest.raises(WeightsError, match=r"bad\.safetensors"):
        load_clip(tiny, tmp_path / "bad.safetensors")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(WeightsError, match=r"torch.save\(model.state_dict\(\)"):
        load_clip(tiny, tmp_path / "module.pt")
    torch.save({**state, "visual.proj": torch.full((128, 128), torch.nan)}, tmp_path / "nan.pt")
    with pytest.raises(WeightsError, match=r"tensor visual\.proj: got 16384 of 16384 values NaN"):
        load_clip(tiny, tmp_path / "nan.pt")


def test_a_file_for_another_image_size_is_resized_with_a_warning(tmp_path, tiny):
    large = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 48}}
    torch.save(clip_of(large)[0].state_dict(), tmp_path / "large.pt")
    with pytest.warns(UserWarning, match="its 37 position embeddings were resized to the 17"):
        load_clip(tiny, tmp_path / "large.pt")


def test_images_that_are_not_square_are_refused(monkeypatch):
    wide = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": [32, 64]}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "wide", wide)
    with pytest.raises(ParamsError, match="got images of 32 x 64; expected square images"):
        load_clip("wide", "random")


def test_a_tokenizer_of_another_library_is_taken_or_asked_for_in_one_line(tmp_path, monkeypatch):
    siglip = {**TINY, "text_cfg": {**TEXT, "hf_tokenizer_name": "some/tokenizer", "tokenizer_kwargs": {"clean": "x"}}}
    monkeypatch.setattr(models, "find_spec", lambda _: None)
    with pytest.raises(ParamsError, match=r"tokenizer some/tokenizer: .*pip install transformers"):
        heads.tokenizer(siglip)
    monkeypatch.setattr(models, "find_spec", lambda name: name)
    asked = []

    class Stub:
        def __init__(self, *args, **kwargs):
            asked.append((args, kwargs))

        def __call__(self, texts):
            return [[len(t)] * 16 for t in texts]

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", Stub)
    assert heads.tokenizer(siglip)(["abc"]).shape == (1, 16)
    clip = clip_of(siglip)[1]
    (tmp_path / "tokenizer.json").touch()
    clip.meta["backbone"]["pretrained"] = str(tmp_path)
    anchor_of(clip, ["cat", "dog"], PROMPTS)
    options = {"context_length": 16, "tokenizer_mode": None, "clean": "x"}
    assert asked == [(("some/tokenizer",), options), ((str(tmp_path),), options)]

    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(open_clip.tokenizer, "HFTokenizer", offline)
    with pytest.raises(ParamsError, match="OSError: We couldn't connect to the hub; expected its files"):
        heads.tokenizer(siglip)


# --- other people's checkpoints


def tuned(seed=5):
    """The tensors of a fine-tuned CLIP with a head, as torch has them."""
    model, _ = clip_of(TINY, seed)
    return model.state_dict(), {"weight": torch.full((2, 128), 0.25), "bias": torch.tensor([1.0, 2.0])}


def visual_of(state):
    return {k: v for k, v in state.items() if k.startswith("visual.")}


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("", "head"),
        ("module.", "module.classification_head"),
        ("image_encoder.model.", "classification_head"),
        ("model.", "classification_head"),
        ("clip.", "fc"),
        ("module.clip.", "module.classifier"),
    ],
)
def test_a_checkpoint_is_adopted_whatever_its_prefix(tmp_path, own_anchor, prefix, head):
    state, layer = tuned()
    tensors = {prefix + k: v for k, v in state.items()} | {f"{head}.{k}": v for k, v in layer.items()}
    torch.save(tensors, tmp_path / "tuned.pt")
    found = adopt(tmp_path / "tuned.pt", own_anchor)
    expected = {k: v.numpy() for k, v in visual_of(state).items()}
    expected |= {"head.weight": np.full((2, 128), 0.25, np.float32), "head.bias": np.array([1, 2], np.float32)}
    assert found.identity == WeightSet(expected).identity
    assert found.meta["parents"] == [own_anchor.identity]
    made = found.meta["made_by"]
    assert (made["stage"], made["source"], made["options"]) == ("finetune", "tuned.pt", {"head": "own"})
    for key in ("architecture", "preprocess", "classes_sha256", "classes", "backbone"):
        assert found.meta[key] == own_anchor.meta[key]


def test_adopted_checkpoints_merge_with_the_anchor(tmp_path, own_anchor):
    for seed in (5, 6):
        state, layer = tuned(seed)
        torch.save(
            {"state_dict": {**state, **{f"head.{k}": v * seed for k, v in layer.items()}}}, tmp_path / f"{seed}.pt"
        )
    found = [adopt(tmp_path / f"{seed}.pt", own_anchor) for seed in (5, 6)]
    merged, _ = merge_with("uniform", own_anchor, found)
    np.testing.assert_allclose(merged.tensors["head.weight"], 0.25 * 5.5, rtol=1e-6)
    models.build_classifier(merged)


@pytest.mark.parametrize("form", ["tower alone", "folder", "training checkpoint", "bfloat16"])
def test_towers_come_alone_in_folders_in_training_checkpoints_and_in_half_precision(tmp_path, own_anchor, form):
    state, _ = tuned()
    path, expected = tmp_path / "tuned.pt", visual_of(state)
    if form == "tower alone":
        torch.save({k.removeprefix("visual."): v for k, v in expected.items()}, path)
    elif form == "folder":
        path = folder_of(tmp_path / "tuned", state, TINY)
    elif form == "training checkpoint":
        prefixed = {f"module.{k}": v for k, v in state.items()}
        torch.save({"epoch": 1, "name": "x", "state_dict": prefixed, "optimizer": {"lr": 1}}, path)
    else:
        half = {k: v.bfloat16() for k, v in state.items()}
        expected = {k: v.float() for k, v in visual_of(half).items()}
        save_file(half, path := path.with_suffix(".safetensors"))
    found = adopt(path, own_anchor)
    head = {k: v for k, v in own_anchor.tensors.items() if k.startswith("head.")}
    assert found.identity == WeightSet({**{k: v.numpy() for k, v in expected.items()}, **head}).identity
    assert found.meta["made_by"]["options"] == {"head": "anchor"}
    assert "/" not in found.meta["made_by"]["source"]


def test_a_checkpoint_with_a_text_tower_gets_its_own_zero_shot_head_where_prompts_are_given(tmp_path, own_anchor):
    model, clip = clip_of(TINY, seed=5)
    torch.save({f"model.{k}": v for k, v in model.state_dict().items()}, tmp_path / "tuned.pt")
    found = adopt(tmp_path / "tuned.pt", own_anchor, prompts=PROMPTS)
    assert found.identity == anchor_of(clip, ["cat", "dog"], PROMPTS).identity
    assert found.meta["made_by"]["options"] == {"head": "zero-shot"}
    torch.save(visual_of(model.state_dict()), tmp_path / "tower.pt")
    assert adopt(tmp_path / "tower.pt", own_anchor, prompts=PROMPTS).meta["made_by"]["options"] == {"head": "anchor"}


def test_our_own_files_stay_as_they_are_and_must_fit(tmp_path, anchor, variants):
    variants[0].save(tmp_path / "ours.safetensors")
    found = adopt(tmp_path / "ours.safetensors", anchor)
    assert (found.identity, found.meta) == (variants[0].identity, variants[0].meta)
    WeightSet(variants[0].tensors, {**variants[0].meta, "classes_sha256": "0" * 64}).save(
        tmp_path / "other.safetensors"
    )
    with pytest.raises(WeightsError, match="a head for other classes"):
        adopt(tmp_path / "other.safetensors", anchor)
    less = {k: v for k, v in variants[0].tensors.items() if k != "visual.proj"}
    WeightSet(less, variants[0].meta).save(tmp_path / "less.safetensors")
    with pytest.raises(WeightsError, match=r"visual\.proj missing"):
        adopt(tmp_path / "less.safetensors", anchor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("visual.proj"), "1 of the image tower's .* tensors missing: visual.proj;"),
        (lambda s: s.update({"visual.proj": torch.zeros(2, 2)}), r"visual.proj is \(2, 2\), the anchor's \(128, 128\)"),
        (
            lambda s: s.update({"head.weight": torch.zeros(3, 128)}),
            r"head.weight is \(3, 128\), the anchor's \(2, 128\)",
        ),
        (lambda s: s.update({f"{h}.weight": torch.zeros(2, 128) for h in ("head", "fc")}), "2 heads: fc, head"),
        (lambda s: s.update({"visual.new": torch.zeros(1)}), "visual.new unknown; .* no more in its image tower"),
        (
            lambda s: s.update({f"ema.{k}": v for k, v in list(s.items())}),
            "2 image towers, under 'ema.visual.' and 'vis",
        ),
        (lambda s: s.update({"visual.proj": torch.full((128, 128), torch.inf)}), "tensor visual.proj: got 16384 of"),
    ],
)
def test_what_does_not_fit_the_anchor_is_refused_by_name(tmp_path, own_anchor, change, message):
    state, _ = tuned()
    change(state)
    torch.save(state, tmp_path / "tuned.pt")
    with pytest.raises(WeightsError, match=message) as caught:
        adopt(tmp_path / "tuned.pt", own_anchor)
    assert "tuned.pt" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickled_module_is_refused_with_the_cure(tmp_path, own_anchor):
    torch.save(models.build_classifier(own_anchor), tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match=r"torch.save\(model.state_dict\(\), ...\)"):
        adopt(tmp_path / "whole.pt", own_anchor)


# --- in the pipeline


@pytest.mark.parametrize("name", ["linear", "probe", "cls_head", "model.head.1", "zeroshot_head"])
def test_a_tensor_of_the_heads_shape_under_no_name_of_a_head_is_refused(tmp_path, own_anchor, name):
    state, layer = tuned()
    torch.save(visual_of(state) | {f"{name}.{k}": v for k, v in layer.items()}, tmp_path / "tuned.pt")
    with pytest.raises(WeightsError, match=rf"got {name}\.weight of the head's shape, .*; rename it to head\.weight"):
        adopt(tmp_path / "tuned.pt", own_anchor)


def test_what_was_taken_and_what_is_assumed_of_it_is_a_notice_that_stays_with_the_weights(tmp_path, own_anchor):
    state, layer = tuned()
    raw = visual_of(state) | {f"head.{k}": v for k, v in layer.items()} | {"aux.weight": layer["weight"] + 1}
    average = {k: v + 1 for k, v in raw.items()}
    torch.save({"state_dict": raw, "state_dict_ema": average}, tmp_path / "tuned.pt")
    with pytest.warns(Notice) as given:
        found = adopt(tmp_path / "tuned.pt", own_anchor)
    assert found.meta["notices"] == [str(one.message) for one in given]
    assert [line.removeprefix(f"{tmp_path / 'tuned.pt'}: ") for line in found.meta["notices"]] == [
        "its entry state_dict is taken, a model; state_dict_ema left aside: to take it, save it in a file of its own",
        "the head is head; aux.weight of the same shape left aside",
        "its head head is taken as a layer over normalised features",
    ]
    torch.save(visual_of(state), tmp_path / "headless.pt")
    with pytest.warns(Notice, match="no head in it that can be used: the anchor's is"):
        headless = adopt(tmp_path / "headless.pt", own_anchor)
    merged, _ = merge_with("uniform", own_anchor, [found, headless])
    assert [line for line in merged.meta["notices"] if "state_dict_ema" in line]


def test_our_own_weights_of_another_anchor_are_refused_and_the_anchor_itself_is_not(tmp_path, own_anchor):
    other = anchor_of(clip_of(TINY, 1)[1], ["cat", "dog"], PROMPTS)
    seed = WeightSet(
        {n: t + 1 for n, t in own_anchor.tensors.items()}, {**own_anchor.meta, "parents": [other.identity]}
    )
    for weights, name in ((seed, "seed"), (own_anchor, "anchor")):
        weights.save(tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=rf"got weights made from {other.identity[:12]}; expected from the anchor"):
        adopt(tmp_path / "seed.safetensors", own_anchor)
    assert adopt(tmp_path / "anchor.safetensors", own_anchor).identity == own_anchor.identity


def test_a_checkpoint_adopted_for_a_seed_is_that_seed_in_every_table(tmp_path, own_anchor):
    for number in (0, 1):
        state, layer = tuned(number)
        head = {f"head.{k}": v for k, v in layer.items()} if number == 0 else {}
        torch.save({**state, **head}, tmp_path / f"{number}.pt")
    for seed, number, head in ((7, 0, "own"), (3, 1, "zero-shot")):
        weights = adopt_seed(tmp_path / f"{number}.pt", own_anchor, seed=seed, prompts=PROMPTS)
        np.testing.assert_array_equal(weights.tensors["visual.proj"], tuned(number)[0]["visual.proj"])
        assert weights.meta["made_by"] == made_by(
            stage="finetune", seed=seed, source=f"{number}.pt", options={"head": head}
        )
        assert row_of(weights).name == f"seed-{seed}"


def test_our_own_weight_set_adopted_for_a_seed_keeps_its_tensors_and_parents(tmp_path, anchor, variants):
    variants[2].save(tmp_path / "ours.safetensors")
    weights = adopt_seed(tmp_path / "ours.safetensors", anchor, seed=5)
    assert (weights.identity, weights.meta["parents"]) == (variants[2].identity, [anchor.identity])
    assert (weights.meta["made_by"]["seed"], weights.meta["made_by"]["options"]) == (5, {"head": "own"})


def test_the_stages_make_a_clip_of_open_clip_and_its_anchor(tmp_path, monkeypatch, tiny):
    from stages import anchor as anchor_stage
    from stages import pretrain as pretrain_stage

    class All:
        threads, device = torch.get_num_threads(), "cpu"
        pretrain = OpenClipPretraining(source="open_clip", architecture=tiny, pretrained="random", seed=2)
        classes = ClassesParams(names=["cat", "dog"], templates=["a {}."])
        anchor = AnchorParams(head="prompts", scale="model")

    none = tmp_path / "no data"  # nothing is made from them
    monkeypatch.chdir(tmp_path)
    for stage in (anchor_stage, pretrain_stage):
        monkeypatch.setattr(stage, "load_params", lambda: All)
        monkeypatch.setattr(stage, "deterministic", lambda threads: None)
    pretrain_stage.main(tmp_path / "clip")
    anchor_stage.main(tmp_path / "clip/clip.safetensors", none, none, tmp_path / "anchor.safetensors")
    clip, anchor = load_weights(tmp_path / "clip/clip.safetensors"), load_weights(tmp_path / "anchor.safetensors")
    assert anchor.meta["parents"] == [clip.identity]
    assert anchor.identity == anchor_of(clip, ["cat", "dog"], [lambda n: f"a {n}."]).identity
    assert len(list((tmp_path / "scratch/heads").iterdir())) == 1
    first = (tmp_path / "anchor.safetensors").read_bytes()
    anchor_stage.main(tmp_path / "clip/clip.safetensors", none, none, tmp_path / "anchor.safetensors")
    assert (tmp_path / "anchor.safetensors").read_bytes() == first
