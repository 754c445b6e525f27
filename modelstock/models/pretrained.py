"""CLIPs of open_clip as weight sets: the config of an architecture, and weights by tag, file, folder, or at random."""

import json
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import huggingface_hub
import open_clip
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.factory import load_checkpoint
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_models_by_tag, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from torch import nn

from modelstock.errors import DataError, ParamsError, WeightsError, closest, few, nearest
from modelstock.files import as_named, on_this_machine
from modelstock.models.towers import build_clip, tensors_of
from modelstock.notices import collected, notice
from modelstock.weights.checkpoints import open_checkpoint, weights_in
from modelstock.weights.differences import differences
from modelstock.weights.format import write_arrays
from modelstock.weights.origin import kept_notices, made_by
from modelstock.weights.tensors import FLOATS, Array, Checkpoint, in_memory
from modelstock.weights.weight_set import WeightSet

CONFIG = "open_clip_config.json"
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
_NUMPY = (".npz", ".npy")  # big_vision's files, which open_clip reads by itself
_SECONDS = 5.0  # in which the hub must answer at all


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a CLIP is made of: its config, the file to load (None: random weights), and how it was preprocessed."""

    config: Mapping[str, Any]
    file: Path | None = None
    preprocess: Mapping[str, Any]


# ---------------------------------------------------------------- what the params name


def _source(architecture: str, pretrained: str) -> Source:
    """What an architecture and a tag, a file, a folder, or `random` mean.

    Raises:
        ParamsError: names that open_clip does not know.
        DataError: weights that are not on this machine while the hub cannot be reached.
    """
    if pretrained == "random":
        return Source(config=_model_config(architecture), preprocess={})
    tags = {tag: get_pretrained_cfg(architecture, tag) for tag in list_pretrained_tags_by_model(architecture)}
    tag, path = pretrained.lower().replace("-", "_"), on_this_machine(pretrained)
    if tag in tags:
        config = _model_config(architecture)
        _check_activation(architecture, config, pretrained, tags[tag])
        file = hub_file(f"pretrain.pretrained {architecture} {pretrained}", tags[tag])
        return Source(config=config, file=file, preprocess=tags[tag])
    if path.is_dir() or path.is_file():
        return _local_source(architecture, path, tags)
    _model_config(architecture)
    near, others = closest(pretrained, [*tags, "random"]), list_pretrained_models_by_tag(tag)
    also = f"; {pretrained} is of {few(sorted(others))}" if others else ""
    raise ParamsError(
        "pretrain.pretrained",
        got=repr(pretrained) + (f", here {path}" if path != Path(pretrained) else ""),
        expected=f"a tag of {architecture}, a file, a folder, or random",
        cure="check the path" + (f", or did you mean {near}?" if near else "") + also,
    )


def _local_source(architecture: str, path: Path, tags: Mapping[str, Mapping[str, Any]]) -> Source:
    """What a file or folder means: the config beside it, or the architecture's; its publisher's preprocessing."""
    folder, file = (path, weights_in(path)) if path.is_dir() else (path.parent, path)
    content = _folder_config(folder)
    if content is not None:
        config = _checked_config(architecture, folder / CONFIG, content["model_cfg"])
        return Source(config=config, file=file, preprocess=content["preprocess_cfg"])
    config = _model_config(architecture)
    published = [tag for tag in tags.values() if str(tag.get("url") or "").rpartition("/")[2] == file.name]
    if published:
        _check_activation(architecture, config, file.name, published[0])
    else:
        _notice_activations(architecture, config, path, tags)
    return Source(config=config, file=file, preprocess=published[0] if published else _agreed(architecture, tags))


def _folder_config(folder: Path) -> Mapping[str, Any] | None:
    """The model_cfg and preprocess_cfg of a folder's `open_clip_config.json`, or None where it has none."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config = {"model_cfg": dict(content["model_cfg"]), "preprocess_cfg": dict(content.get("preprocess_cfg") or {})}
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - config["model_cfg"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            path,
            got=f"{type(error).__name__}: {error}",
            expected="open_clip's config, with a model_cfg",
            cure="copy the file again",
        ) from error
    if missing:
        raise DataError(
            path,
            got=f"a model_cfg without {', '.join(sorted(missing))}",
            expected="a CLIP's",
            cure="copy the file again",
        )
    return config


def _open_clip_config(architecture: str) -> Mapping[str, Any] | None:
    """open_clip's config of that name; a name with a colon would be a place on the hub."""
    config: Mapping[str, Any] | None = open_clip.get_model_config(architecture) if ":" not in architecture else None
    return config


def _model_config(architecture: str) -> Mapping[str, Any]:
    config = _open_clip_config(architecture)
    if config is None:
        raise ParamsError(
            "pretrain.architecture",
            got=repr(architecture),
            expected="a model of open_clip.list_models()",
            cure=nearest(architecture, open_clip.list_models()),
        )
    return config


def _checked_config(architecture: str, path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A folder's own config; a notice where open_clip knows the architecture as something else."""
    named = _open_clip_config(architecture)
    keys = [] if named is None else sorted(named.keys() | config.keys())
    differing = [key for key in keys if named is not None and named.get(key) != config.get(key)]
    if differing:
        text = (
            f"the model is built as this file says, which is not {architecture} of open_clip: {few(differing)} differ"
        )
        notice(path, text)
    return config


def _check_activation(architecture: str, config: Mapping[str, Any], weights: str, tag: Mapping[str, Any]) -> None:
    """Give a notice where weights were trained with another activation than the architecture has."""
    trained, built = bool(tag.get("quick_gelu", False)), bool(config.get("quick_gelu", False))
    if trained == built:
        return
    other = architecture.removesuffix("-quickgelu") if built else f"{architecture}-quickgelu"
    cure = f"set pretrain.architecture to {other}" if open_clip.get_model_config(other) else "take other weights"
    notice(
        weights,
        f"these weights were trained with {'QuickGELU' if trained else 'GELU'}, and {architecture} has "
        f"{'QuickGELU' if built else 'GELU'}: accuracy drops by points; {cure}",
    )


def _notice_activations(
    architecture: str, config: Mapping[str, Any], path: Path, tags: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give a notice where a file of unknown origin may have been trained with another activation than it is built with.

    A state dict does not tell: nothing but its ancestor does.
    """
    quick = bool(config.get("quick_gelu", False))
    others = [name for name, tag in tags.items() if bool(tag.get("quick_gelu", False)) != quick]
    if others:
        other = architecture.removesuffix("-quickgelu") if quick else f"{architecture}-quickgelu"
        notice(
            path,
            f"built with {'QuickGELU' if quick else 'GELU'}, as {architecture} says, while {len(others)} of its "
            f"{len(tags)} published weights ({few(others)}) have {'GELU' if quick else 'QuickGELU'}: if this file "
            f"descends from one of them, name {other}, or put its {CONFIG} beside it",
        )


def _agreed(architecture: str, tags: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The preprocessing of all of an architecture's published weights, where it is one and the same."""
    ways = {json.dumps({key: tag.get(key) for key in _PREPROCESS}): tag for tag in tags.values()}
    if len(ways) > 1:
        notice(
            f"weights of {architecture}",
            f"published with {len(ways)} ways of preprocessing: open_clip's default is taken; put the {CONFIG} that "
            "belongs to the file beside it for another",
        )
    return next(iter(ways.values())) if len(ways) == 1 else {}


# ---------------------------------------------------------------- files


def hub_file(place: str, tag: Mapping[str, Any]) -> Path:
    """The file of a published tag: from the hub's cache, or downloaded into it.

    Raises:
        DataError: it is in no cache and the hub cannot be reached; says which file to bring.
    """
    if "file" in tag:
        return Path(tag["file"])
    repository, _, file = str(tag["hf_hub"]).rpartition("/")
    names = [file.removesuffix(".bin") + ".safetensors", file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
        return _download(repository, names)
    except Exception as error:  # whatever the network, a proxy or the hub does: the cure is the same
        address = str(tag.get("url") or "").rpartition("/")[2]
        also = f" (or {address}, as it was first published)" if address else ""
        line = " ".join(str(error).split())[:160]
        raise DataError(
            place,
            got=f"weights that are not in the cache and cannot be had from the hub ({type(error).__name__}: {line})",
            expected=f"{names[0]} or {names[-1]} of the repository {repository}{also}",
            cure=f"copy it, best with its {CONFIG} beside it, and set pretrain.pretrained: PATH, or --pretrained PATH",
        ) from error


def _download(repository: str, names: list[str]) -> Path:
    """The first of these files that a repository of the hub has."""
    # One request without retries: a machine without a network learns it in seconds, not minutes.
    huggingface_hub.get_session().head(huggingface_hub.hf_hub_url(repository, names[0]), timeout=_SECONDS)
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(repository, name, library_name="open_clip"))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"the repository holds neither {' nor '.join(names)}")


def _scripted(path: Path) -> Mapping[str, torch.Tensor] | None:
    """The tensors of a TorchScript archive, as OpenAI published its models, or None for any other file."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the format, but this is how these files came
        script = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
        state: dict[str, torch.Tensor] = script.state_dict()
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def _load_into(model: nn.Module, path: Path) -> None:
    """Load a checkpoint of any form that open_clip reads.

    Raises:
        WeightsError: a damaged file, a pickle of more than tensors, or tensors of another architecture.
    """
    if not path.is_file():
        raise WeightsError(path, got="no such file", expected="a checkpoint", cure="check pretrain.pretrained")
    scripted = _scripted(path)
    try:
        if scripted is not None:
            # Archives keep buffers that state dicts leave out.
            computed = dict(model.named_buffers()).keys() - model.state_dict().keys()
            model.load_state_dict({name: tensor for name, tensor in scripted.items() if name not in computed})
        else:
            with _as_open_clip_reads(path) as readable:
                load_checkpoint(model, str(readable), strict=True, weights_only=True)
            _notice_if_resized(model, path)
    except Exception as error:  # open_clip, torch, pickle and safetensors each have their own
        checkpoint = open_checkpoint(path) if scripted is None else _as_checkpoint(scripted, path)
        problems = differences(checkpoint.tensors, model.state_dict(), whose="the architecture's")
        raise WeightsError(
            checkpoint.source,
            got=few(problems) or " ".join(str(error).split())[:200],
            expected="the tensors of pretrain.architecture",
            cure="name the architecture that the file was trained as",
        ) from error


@contextmanager
def _as_open_clip_reads(path: Path) -> Iterator[Path]:
    """A checkpoint's file, or one beside it that has its model alone, where open_clip would not find it in there."""
    if path.suffix in _NUMPY:
        yield path
        return
    checkpoint = open_checkpoint(path)
    if not checkpoint.taken_from and path.suffix != ".json":
        yield path
        return
    with TemporaryDirectory() as folder:
        alone = Path(folder) / "model.safetensors"
        write_arrays(alone, {name: tensor.array() for name, tensor in checkpoint.tensors.items()})
        yield alone


def _as_checkpoint(state: Mapping[str, torch.Tensor], path: Path) -> Checkpoint:
    return in_memory({name: tensor.float().numpy() for name, tensor in state.items()}, {}, str(path))


def _notice_if_resized(model: nn.Module, path: Path) -> None:
    """Give a notice where open_clip has fitted position embeddings to another image size."""
    name = "visual.positional_embedding"
    built = model.state_dict().get(name)
    if path.suffix in _NUMPY or built is None:
        return
    loaded = open_checkpoint(path).tensors.get(name)
    if loaded is not None and loaded.shape != tuple(built.shape):
        notice(
            path,
            f"made for images of another size; its {loaded.shape[0]} position embeddings were resized to the "
            f"{built.shape[0]} of pretrain.architecture",
        )


def tower_of(
    checkpoint: Checkpoint, prefix: str, expected: Mapping[str, Array]
) -> tuple[dict[str, Array], list[str], list[str]]:
    """A tower's tensors from a checkpoint that has them all under `prefix`, with the dtypes of `expected`.

    `expected`: name there, without the prefix -> array. Returns the tensors by these names, what is wrong with their
    shapes, and the checkpoint's other tensors.
    """
    tensors, problems = {}, []
    for name, built in expected.items():
        tensor = checkpoint.tensors[prefix + name]
        if tuple(tensor.shape) != built.shape:
            problems.append(f"{prefix}{name} is {tuple(tensor.shape)}, not {built.shape}")
        values = tensor.values() if tensor.dtype in FLOATS else tensor.array()
        tensors[name] = values.reshape(tensor.shape).astype(built.dtype)
    return tensors, problems, sorted(checkpoint.tensors.keys() - {prefix + name for name in expected})


# ---------------------------------------------------------------- the weight set


def _preprocess(visual: Any, published: Mapping[str, Any], place: str) -> dict[str, Any]:
    """open_clip's defaults, overlaid with those of the weights' publisher; the size is the tower's.

    Raises:
        ParamsError: a tower for images that are not square.
    """
    merged = merge_preprocess_dict(PreprocessCfg(), dict(published))
    size = visual.image_size
    sides = {int(side) for side in (size if isinstance(size, list | tuple) else [size])}
    if len(sides) != 1:
        raise ParamsError(
            place, got=f"images of {' x '.join(map(str, size))}", expected="square images", cure="take another model"
        )
    values = {key: list(merged[key]) if isinstance(merged[key], list | tuple) else merged[key] for key in _PREPROCESS}
    return {"size": sides.pop(), **values}


def load_clip(architecture: str, pretrained: str | Path, *, seed: int = 0) -> WeightSet:
    """A CLIP of open_clip, both towers, in float32, as a weight set without a head.

    `architecture`: the name of a config; `pretrained`: one of its tags, a file, a folder, or `random`, by `seed`.
    `meta` holds the config as `architecture`, `backbone` {name, pretrained} as they were given, and `preprocess`
    {size, mean, std, interpolation, resize_mode}: open_clip's defaults, overlaid with those of the tag or the folder.

    Raises:
        ParamsError: an architecture or tag that open_clip does not know, or one for images that are not square.
        DataError: weights that are not on this machine while the hub cannot be reached.
        WeightsError: a file that is damaged or of another architecture.
    """
    pretrained = str(pretrained)
    with collected() as notices:
        source = _source(architecture, pretrained)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_clip(source.config)
        preprocess = _preprocess(model.visual, source.preprocess, f"pretrain.architecture {architecture}")
        if source.file is not None:
            _load_into(model, source.file)
    options = {"source": "open_clip", "architecture": architecture, "pretrained": pretrained, "seed": seed}
    meta = {
        "architecture": dict(source.config),
        "backbone": {"name": architecture, "pretrained": pretrained},
        "preprocess": preprocess,
        "parents": [],
        "made_by": made_by(stage="pretrain", options=options),
        **kept_notices(as_named(notices, pretrained)),
    }
    place = str(source.file or f"{architecture} with random weights")
    clip = WeightSet(tensors_of(model.float()), meta, place)
    clip.check_finite()
    return clip
