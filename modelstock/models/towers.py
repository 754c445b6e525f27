"""CLIP models of open_clip, and classifiers made of a tower and a head.

A tower turns a batch into features: images by a CLIP's image tower or a model of timm, texts by a CLIP's text tower or
an encoder of the library transformers. What `meta["architecture"]` of a weight set calls its `kind` is a row of TOWERS.
torch and open_clip cost seconds to import, so only what needs a model imports this.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from numpy.typing import NDArray
from open_clip.model import _build_text_tower, _build_vision_tower
from torch import Tensor, nn
from torch.nn import functional

from modelstock.errors import ModelstockError, ParamsError, WeightsError, few, nearest
from modelstock.weights.differences import differences
from modelstock.weights.weight_set import WeightSet

# A ViT small enough for two CPU cores: 0.8M parameters in the image tower, 17 tokens an image.
TINY_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 128, "head_width": 32, "layers": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def _without_downloads(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config whose towers start from random weights: whatever they should hold is loaded afterwards."""
    blank: dict[str, Any] = copy.deepcopy(dict(config))
    for section, timm_or_hf in (("vision_cfg", "timm_model"), ("text_cfg", "hf_model")):
        if f"{timm_or_hf}_name" in blank.get(section, {}):
            blank[section][f"{timm_or_hf}_pretrained"] = False
    return blank


def build_clip(config: Mapping[str, Any]) -> nn.Module:
    """A CLIP, CustomTextCLIP or CoCa with random weights from an open_clip model config; the caller seeds torch.

    Raises:
        ParamsError: a text tower of the library `transformers`, which is not installed or does not find its config.

    Source: open_clip's factory, which chooses the class in the same way.
    """
    blank = _without_downloads(config)
    custom = blank.pop("custom_text", False) or "hf_model_name" in blank["text_cfg"]
    kind = open_clip.CLIP if not custom else open_clip.CoCa if "multimodal_cfg" in blank else open_clip.CustomTextCLIP
    if "hf_model_name" not in blank["text_cfg"]:
        model: nn.Module = kind(**blank)
    else:
        name = blank["text_cfg"]["hf_model_name"]
        with from_transformers(f"text tower {name}", f"the config of {name}"):
            model = kind(**blank)
    if isinstance(model, open_clip.CoCa):
        # open_clip leaves it as the memory was; this is what its own init_parameters, which nothing calls, would do.
        projection = model.text_decoder.text_projection
        nn.init.normal_(projection, std=projection.shape[0] ** -0.5)
    return model


_HUB = "connect to the hub once, or copy its files to the cache or to the folder pretrain.pretrained"


@contextmanager
def from_transformers(place: str, wanted: str, *, cure: str = _HUB) -> Iterator[None]:
    """Errors of the library `transformers`, and its absence, as one line."""
    if find_spec("transformers") is None:
        raise ParamsError(
            place, got="no library transformers", expected="it, which makes it", cure="pip install transformers"
        )
    try:
        yield
    except ModelstockError:
        raise
    except Exception as error:  # its errors are of any class; those of `tokenizers` are plain Exceptions
        line = " ".join(str(error).split())[:200]
        raise ParamsError(place, got=f"{type(error).__name__}: {line}", expected=wanted, cure=cure) from error


def build_visual(config: Mapping[str, Any]) -> nn.Module:
    """The image tower of `build_clip(config)` alone, with random weights: images (B, 3, S, S) -> features (B, D)."""
    blank = _without_downloads(config)
    visual: nn.Module = _build_vision_tower(blank["embed_dim"], blank["vision_cfg"], blank.get("quick_gelu", False))
    return visual


def build_text(architecture: Mapping[str, Any]) -> nn.Module:
    """The text tower of a CLIP of open_clip, with random weights: tokens (B, L) -> features (B, D).

    `architecture["config"]`: open_clip's, of which `embed_dim`, `text_cfg` and `quick_gelu` count.
    """
    config = _without_downloads(architecture["config"])
    text: Any = _build_text_tower(config["embed_dim"], config["text_cfg"], config.get("quick_gelu", False))
    text.transformer.register_forward_pre_hook(_mask_of_its_length, with_kwargs=True)
    return text  # type: ignore[no-any-return]


def _mask_of_its_length(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Of open_clip's causal mask, which is that of the longest texts, what texts of this length need."""
    mask, length = kwargs.get("attn_mask"), args[0].shape[1]
    return args, {**kwargs, "attn_mask": mask[:length, :length] if mask is not None and mask.ndim == 2 else mask}


POOLINGS = ("mean_pooler", "cls_last_hidden_state_pooler", "cls_pooler")
# Encoders of transformers that are taken: both-sided attention, and a mask for what fills up.
ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)


class Encoder(nn.Module):
    """An encoder of the library transformers and a pooling of its states: tokens (B, L) -> features (B, width).

    Tensors are named, and poolings called, as those of open_clip's HFTextEncoder, which takes fewer encoders:
    `mean_pooler` over a text's tokens, `cls_last_hidden_state_pooler` its first token, `cls_pooler`
    what the encoder itself makes of that. `projection`: open_clip's `hf_proj_type`, None for the encoder's own width.
    """

    def __init__(self, transformer: nn.Module, *, width: int, pooling: str, projection: str | None = None) -> None:
        super().__init__()
        self.transformer, self._pooling = transformer, pooling
        config: Any = transformer.config
        self._pad, inner, between = config.pad_token_id, config.hidden_size, (config.hidden_size + width) // 2
        if projection == "mlp":
            first, last = nn.Linear(inner, between, bias=False), nn.Linear(between, width, bias=False)
            self.proj: nn.Module = nn.Sequential(first, nn.GELU(), last)
        else:
            self.proj = nn.Linear(inner, width, bias=False) if projection else nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        mask = (tokens != self._pad).long()
        out = self.transformer(input_ids=tokens, attention_mask=mask)
        pooled: Tensor = self.proj(out.pooler_output if self._pooling == "cls_pooler" else self._pool(out[0], mask))
        return pooled

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep no activations of the layers for the backward pass, as open_clip's towers can."""
        transformer: Any = self.transformer
        (transformer.gradient_checkpointing_enable if enable else transformer.gradient_checkpointing_disable)()

    def _pool(self, states: Tensor, mask: Tensor) -> Tensor:
        if self._pooling == "mean_pooler":
            return (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        return states[:, 0]


def config_of(architecture: Mapping[str, Any]) -> Any:
    """The config of transformers of an encoder's architecture."""
    from transformers import AutoConfig

    values = {name: value for name, value in architecture["config"].items() if name != "model_type"}
    return AutoConfig.for_model(architecture["config"]["model_type"], **values)


def build_encoder(architecture: Mapping[str, Any]) -> nn.Module:
    """An encoder of the library transformers with random weights: tokens (B, L) -> features (B, D); see Encoder.

    `architecture`: `config`, that of transformers; `pooling`; `width`, D; `projection`.

    Raises:
        ParamsError: `transformers` is not installed, or does not build it; none of ENCODERS; a pooling that it lacks.
    """
    place = "an encoder of transformers"
    with from_transformers(place, "a config that it builds", cure="correct its config.json"):
        from transformers import AutoModel

        config = config_of(architecture)
        check_encoder(config, place)
        transformer: Any = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    pooling, projection = architecture["pooling"], architecture.get("projection")
    if pooling == "cls_pooler" and getattr(transformer, "pooler", None) is None:
        raise ParamsError(
            place, got=f"pooling pooler for {config.model_type}, which has none", expected="another", cure="set mean"
        )
    if pooling != "cls_pooler" and getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None  # in no feature, and no gradient reaches it
    if pooling not in POOLINGS or projection not in (None, "linear", "mlp"):
        got = f"pooling {str(pooling)[:40]!r}, projection {str(projection)[:40]!r}"
        raise ParamsError(place, got=got, expected=", ".join(POOLINGS), cure="name another")
    if projection is None and architecture["width"] != config.hidden_size:
        got, expected = f"width {architecture['width']} without projection", f"{config.hidden_size}, the encoder's"
        raise ParamsError(place, got=got, expected=expected, cure="make the weight set again")
    return Encoder(transformer, width=architecture["width"], pooling=pooling, projection=projection)


def check_encoder(config: Any, place: str) -> None:
    """Raise ParamsError unless a config of transformers is that of one of ENCODERS that masks what fills up."""
    problem = None
    if config.model_type not in ENCODERS or config.is_encoder_decoder:
        problem = f"a model of type {config.model_type}"
    elif getattr(config, "is_decoder", False):
        problem = f"a {config.model_type} that is a decoder"
    elif config.pad_token_id is None:
        problem = f"a {config.model_type} without pad_token_id"
    if problem is not None:
        cure = "set pad_token_id in config.json" if "without" in problem else "name another"
        expected = f"an encoder that masks what fills up: {', '.join(ENCODERS)}"
        raise ParamsError(place, got=problem, expected=expected, cure=cure)


def build_timm(architecture: Mapping[str, Any]) -> nn.Module:
    """A model of timm without its classifier, with random weights: images (B, 3, S, S) -> features (B, D).

    `architecture`: `name`, timm's; `options`, more of `timm.create_model`.

    Raises:
        ParamsError: a name that timm does not know.
    """
    name = architecture["name"]
    if not timm.is_model(name):
        raise ParamsError(
            "a model of timm",
            got=repr(name),
            expected="one of timm.list_models()",
            cure=nearest(name, timm.list_models()),
        )
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **architecture.get("options", {}))
    return model


@dataclass(frozen=True)
class Kind:
    """A kind of towers. `prefix`: of its tensors' names. `modality`: of its inputs. `build`: from an architecture."""

    prefix: str
    modality: str
    build: Callable[[Mapping[str, Any]], nn.Module]


# By the `kind` of `meta["architecture"]`; an open_clip config as it is has none, and is of the first.
TOWERS = {
    "open_clip": Kind("visual.", "image", build_visual),
    "open_clip-text": Kind("text.", "text", build_text),
    "transformers": Kind("text.", "text", build_encoder),
    "timm": Kind("visual.", "image", build_timm),
}


def kind_of(weights: WeightSet) -> Kind:
    """The kind of a weight set's tower.

    Raises:
        WeightsError: it is none of TOWERS.
    """
    kind = weights.meta["architecture"].get("kind", "open_clip")
    if not isinstance(kind, str) or kind not in TOWERS:
        raise WeightsError(
            weights.source,
            got=f"a tower of the kind {str(kind)[:40]!r}",
            expected=", ".join(TOWERS),
            cure="read it with the version of modelstock that wrote it",
        )
    return TOWERS[kind]


def width_of(weights: WeightSet) -> int:
    """The width D of a tower's features."""
    architecture = weights.meta["architecture"]
    config = architecture.get("config", architecture) if "width" not in architecture else {}
    return int(architecture["width"] if "width" in architecture else config["embed_dim"])


def _blank_tower(weights: WeightSet) -> nn.Module:
    """The tower on the CPU, for weights to be loaded into; what the weights do not hold is right already.

    Raises:
        WeightsError: an architecture that cannot be built, or that has other tensors; before it takes any memory.
    """
    kind, architecture = kind_of(weights), weights.meta["architecture"]
    try:
        with torch.device("meta"):
            tower = kind.build(architecture)
    except Exception as error:  # a file may say anything
        if isinstance(error, ParamsError) and find_spec("transformers") is None:
            raise
        raise WeightsError(
            weights.source,
            got=f"an architecture that cannot be built ({type(error).__name__}: {str(error)[:120]})",
            expected="the config of a tower that its library builds",
            cure="make the weight set again from this anchor",
        ) from error
    expected = {f"{kind.prefix}{name}": tensor for name, tensor in tower.state_dict().items()}
    _check_tensors(weights, expected, kind.prefix)
    loaded = tower.state_dict().keys()
    if all(name in loaded for name, _ in tower.named_buffers()):
        return tower.to_empty(device="cpu")
    # Rotary embeddings, relative positions and masks are in no checkpoint: only a real tower computes them.
    with torch.random.fork_rng(devices=[]):
        return kind.build(architecture)


_TOGETHER = 32  # texts of like length that a tower takes at a time


class Classifier(nn.Module):
    """Tower and linear head: logits = W normalise(tower(inputs)) + b; without `normalise`, W tower(inputs) + b.

    Inputs -> logits (B, C). Images (B, 3, S, S) are normalised by the preprocess's mean and std; texts are tokens
    (B, L) int64, filled up with `padding` (None: every text has the tower's whole length). In evaluation, texts of like
    length go together, without the padding that only longer ones need.
    """

    def __init__(
        self,
        tower: nn.Module,
        classes: int,
        width: int,
        *,
        prefix: str = "visual.",
        normalise: bool = True,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self._name, self._normalise, self._padding = prefix.rstrip("."), normalise, padding
        self.add_module(self._name, tower)  # as its tensors are named
        self.head = nn.Linear(width, classes)

    @property
    def tower(self) -> nn.Module:
        """What makes the features."""
        return self.get_submodule(self._name)

    def features(self, inputs: Tensor) -> Tensor:
        """The tower's pooled feature (B, D), not normalised."""
        if self._padding is None or self.training:
            return _pooled(self.tower(inputs))
        # The token that fills up may occur in a text as well, but is never its last.
        lengths = inputs.shape[1] - (inputs != self._padding).flip(1).int().argmax(dim=1)
        order = lengths.argsort(stable=True)
        parts = [
            _pooled(self.tower(inputs[rows, : int(lengths[rows].max())])) for rows in torch.split(order, _TOGETHER)
        ]
        return torch.cat(parts)[order.argsort()]

    def logits(self, features: Tensor) -> Tensor:
        """Class logits (B, C) of features (B, D), in the head's precision."""
        features = features.to(self.head.weight.dtype)
        logits: Tensor = self.head(functional.normalize(features, dim=-1) if self._normalise else features)
        return logits

    def forward(self, inputs: Tensor) -> Tensor:
        features = self.features(inputs)
        logits: Tensor = self.head(functional.normalize(features, dim=-1) if self._normalise else features)
        return logits


def _pooled(output: Any) -> Tensor:
    # Towers of captioning models give their tokens as well, after the pooled feature.
    pooled: Tensor = output[0] if isinstance(output, tuple) else output
    return pooled


def check_classifier(weights: WeightSet) -> None:
    """Raise WeightsError unless a weight set says what to build, how its inputs are preprocessed, and has a head."""
    missing = [name for name in ("architecture", "preprocess") if name not in weights.meta]
    missing += [name for name in ("head.weight", "head.bias") if name not in weights.shaped]
    if missing or len(weights.shaped["head.weight"].shape) != 2:
        raise WeightsError(
            weights.source,
            got=f"a file without {', '.join(missing) or 'a linear head'}",
            expected="a weight set made by modelstock",
            cure="make it with the stages anchor, finetune or merge; for others' checkpoints, name the --anchor",
        )


def build_classifier(weights: WeightSet) -> Classifier:
    """The classifier that a weight set describes, in evaluation mode.

    Raises:
        WeightsError: no architecture in the metadata, or tensors that do not fit it.
    """
    check_classifier(weights)
    tower, preprocess = _blank_tower(weights), weights.meta["preprocess"]
    classes, width = weights.shaped["head.weight"].shape
    with torch.device("meta"):
        model = Classifier(
            nn.Identity(),
            classes,
            width,
            prefix=kind_of(weights).prefix,
            normalise=weights.meta["architecture"].get("normalise", True),
            padding=preprocess["pad"] if preprocess.get("padding") == "longest" else None,
        )
    model.head.to_empty(device="cpu")
    setattr(model, kind_of(weights).prefix.rstrip("."), tower)
    set_tensors(model, weights)
    return model.eval()


class Tower:
    """A weight set's classifier on a device: inputs -> logits (B, C) float32.

    `dtype`: of the tower; the head, and all that follows it, is float32.
    """

    def __init__(self, weights: WeightSet, device: str, dtype: torch.dtype) -> None:
        self.identity, self.preprocess = weights.identity, weights.meta["preprocess"]
        self._model = build_classifier(weights).to(device)
        self._model.tower.to(dtype)

    def logits(self, inputs: Tensor) -> Tensor:
        """Class logits of a batch: pixels (B, 3, S, S) in the tower's dtype, or tokens (B, L)."""
        return self._model.logits(self._model.features(inputs))


def set_tensors(model: nn.Module, weights: WeightSet) -> None:
    """Copy a weight set's tensors into a model.

    Raises:
        WeightsError: names or shapes that differ from the model's.
    """
    _check_tensors(weights, model.state_dict())
    model.load_state_dict({k: torch.from_numpy(np.asarray(v, order="C")) for k, v in weights.tensors.items()})


def _check_tensors(weights: WeightSet, expected: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raise WeightsError unless the weights whose names begin with `prefix` have these names and shapes."""
    tensors = {name: tensor for name, tensor in weights.shaped.items() if name.startswith(prefix)}
    problems = differences(tensors, expected, whose="the model's")
    if problems:
        raise WeightsError(
            weights.source,
            got=few(problems, 12),
            expected="the tensors of its architecture",
            cure="make the weight set again from this anchor",
        )


def tensors_of(model: nn.Module) -> dict[str, NDArray[Any]]:
    """The model's state as arrays: copies, so later training does not change them."""
    return {k: v.detach().cpu().numpy().copy() for k, v in model.state_dict().items()}
