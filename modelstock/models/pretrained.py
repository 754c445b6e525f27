"""Anchors from any CLIP of open_clip, and other people's fine-tuned checkpoints as weight sets that merge with one.

torch and open_clip are imported where a model is built: reading a checkpoint of one's own needs neither.
"""

import difflib
import hashlib
import json
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelstock import __version__
from modelstock.data.classes import prompts_key
from modelstock.errors import DataError, ParamsError, WeightsError
from modelstock.params import OpenClipPretraining
from modelstock.weights.checkpoints import open_checkpoint
from modelstock.weights.tensors import FLOATS, Array, Checkpoint, StoredTensor, in_memory, widen
from modelstock.weights.weight_set import WeightSet, classes_sha256, load_weights

Prompts = Sequence[Callable[[str], str]]
CONFIG = "open_clip_config.json"
# Downloaded repositories often hold other libraries' forms of the same weights too: open_clip's come first.
_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode")
_HEADS = ("classification_head", "head", "fc", "classifier")
_SECONDS = 5.0  # in which the hub must answer at all


def _few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _nearest(name: str, known: Sequence[str]) -> str:
    lower = {k.lower(): k for k in known}
    close = [lower[k] for k in difflib.get_close_matches(name.lower(), list(lower), 3, 0.5)]
    return " or ".join(close) if close else _few(sorted(known), 12) or "none"


def _weights_in(folder: Path) -> Path:
    """The file of a folder that holds open_clip's weights."""
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    return found or Path(open_checkpoint(folder).source)


def _folder_config(folder: Path) -> Mapping[str, Any] | None:
    """What a folder's `open_clip_config.json` says, or None where it has none."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = {"model_cfg": dict(said["model_cfg"]), "preprocess_cfg": dict(said.get("preprocess_cfg") or {})}
        missing = {"embed_dim", "vision_cfg", "text_cfg"} - found["model_cfg"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    return found


def _hub_file(place: str, tag: Mapping[str, Any]) -> Path:
    """The file of a published tag: from the hub's cache, or downloaded into it.

    Raises:
        DataError: it is in no cache and the hub cannot be reached; says which file to bring.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    if "file" in tag:
        return Path(tag["file"])
    repository, _, file = str(tag["hf_hub"]).rpartition("/")
    names = [file.removesuffix(".bin") + ".safetensors", file] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    for name in names:
        cached = huggingface_hub.try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    try:
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


def _model_config(name: str) -> dict[str, Any]:
    import open_clip

    config = open_clip.get_model_config(name) if ":" not in name else None
    if config is None:
        raise ParamsError(
            "pretrain.architecture",
            got=repr(name),
            expected="a model of open_clip",
            cure=f"did you mean {_nearest(name, open_clip.list_models())}?",
        )
    return dict(config)


def _check_activation(name: str, config: Mapping[str, Any], tag: str, said: Mapping[str, Any]) -> None:
    """Warn where weights were trained with another activation than the architecture has."""
    import open_clip

    trained, built = bool(said.get("quick_gelu", False)), bool(config.get("quick_gelu", False))
    if trained == built:
        return
    other = name.removesuffix("-quickgelu") if built else f"{name}-quickgelu"
    cure = f"set pretrain.architecture to {other}" if open_clip.get_model_config(other) else "take other weights"
    warnings.warn(
        f"{tag}: these weights were trained with {'QuickGELU' if trained else 'GELU'}, and {name} has "
        f"{'QuickGELU' if built else 'GELU'}: accuracy drops by points; {cure}",
        stacklevel=3,
    )


def _source(params: OpenClipPretraining) -> tuple[dict[str, Any], Path | None, Mapping[str, Any]]:
    """The config to build, the file to load (None: random weights), and what is known of the preprocessing."""
    from open_clip import pretrained as published

    name, wanted = params.architecture, params.pretrained
    if wanted == "random":
        return _model_config(name), None, {}
    tags = {tag: published.get_pretrained_cfg(name, tag) for tag in published.list_pretrained_tags_by_model(name)}
    tag = wanted.lower().replace("-", "_")
    path = Path(wanted)
    if tag in tags:
        config = _model_config(name)
        _check_activation(name, config, wanted, tags[tag])
        return config, _hub_file(f"pretrain.pretrained {name} {wanted}", tags[tag]), tags[tag]
    if path.is_dir() or path.is_file():
        folder, file = (path, _weights_in(path)) if path.is_dir() else (path.parent, path)
        said = _folder_config(folder)
        if said is not None:
            return _checked_config(name, folder / CONFIG, said["model_cfg"]), file, said["preprocess_cfg"]
        config = _model_config(name)
        known = [t for t in tags.values() if str(t.get("url") or "").rpartition("/")[2] == file.name]
        if known:
            _check_activation(name, config, file.name, known[0])
            return config, file, known[0]
        return config, file, _agreed(name, tags)
    _model_config(name)
    elsewhere = published.list_pretrained_models_by_tag(tag)
    also = f"; {wanted} is of {_nearest(name, elsewhere)}" if elsewhere else ""
    raise ParamsError(
        "pretrain.pretrained",
        got=repr(wanted),
        expected=f"a tag of {name}, a file, a folder, or random",
        cure=f"check the path, or did you mean {_nearest(wanted, [*tags, 'random'])}?{also}",
    )


def _checked_config(name: str, path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A folder's own config; a warning where open_clip knows its name as something else."""
    import open_clip

    known = open_clip.get_model_config(name) if ":" not in name else None
    differing = (
        []
        if known is None
        else [key for key in sorted(known.keys() | config.keys()) if known.get(key) != config.get(key)]
    )
    if differing:
        warnings.warn(
            f"{path}: the model is built as this file says, which is not {name} of open_clip: {_few(differing)} differ",
            stacklevel=3,
        )
    return config


def _agreed(name: str, tags: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The preprocessing of all of an architecture's published weights, where it is one and the same."""
    said = {json.dumps({key: tag.get(key) for key in _PREPROCESS}): tag for tag in tags.values()}
    if len(said) > 1:
        warnings.warn(
            f"weights of {name} were published with {len(said)} ways of preprocessing: open_clip's default is taken; "
            f"put the {CONFIG} that belongs to the file beside it to say another",
            stacklevel=3,
        )
    return next(iter(said.values())) if len(said) == 1 else {}


def _preprocess(visual: Any, said: Mapping[str, Any], place: str) -> dict[str, Any]:
    """open_clip's defaults, overlaid with what the weights' publisher says; the size is the tower's.

    Raises:
        ParamsError: a tower for images that are not square.
    """
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), dict(said))
    size = visual.image_size
    sides = {int(side) for side in (size if isinstance(size, list | tuple) else [size])}
    if len(sides) != 1:
        raise ParamsError(
            place, got=f"images of {' x '.join(map(str, size))}", expected="square images", cure="take another model"
        )
    found = {key: list(merged[key]) if isinstance(merged[key], list | tuple) else merged[key] for key in _PREPROCESS}
    return {"size": sides.pop(), **found}


def _scripted(path: Path) -> Mapping[str, Any] | None:
    """The tensors of a TorchScript archive, as OpenAI published its models, or None for any other file."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return None
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the format, but this is how these files came
        state: dict[str, Any] = torch.jit.load(str(path), map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
    return {k: v for k, v in state.items() if k not in ("input_resolution", "context_length", "vocab_size")}


def _load_into(model: Any, path: Path) -> None:
    """Load a checkpoint of any form that open_clip reads.

    Raises:
        WeightsError: a damaged file, a pickle of more than tensors, or tensors of another architecture.
    """
    from open_clip.factory import load_checkpoint

    if not path.is_file():
        raise WeightsError(path, got="no such file", expected="a checkpoint", cure="check pretrain.pretrained")
    scripted = _scripted(path)
    try:
        if scripted is not None:
            # Archives keep buffers that state dicts leave out.
            computed = dict(model.named_buffers()).keys() - model.state_dict().keys()
            model.load_state_dict({name: tensor for name, tensor in scripted.items() if name not in computed})
        else:
            load_checkpoint(model, str(path), strict=True, weights_only=True)
            _say_resized(model, path)
    except Exception as error:  # open_clip, torch, pickle and safetensors each have their own
        _explain(model, _in_memory(scripted, path) if scripted is not None else open_checkpoint(path), error)


def _say_resized(model: Any, path: Path) -> None:
    """Warn where open_clip has fitted position embeddings to another image size."""
    name = "visual.positional_embedding"
    if path.suffix in (".npz", ".npy") or (own := model.state_dict().get(name)) is None:
        return
    found = open_checkpoint(path).tensors.get(name)
    if found is not None and found.shape != tuple(own.shape):
        warnings.warn(
            f"{path}: made for images of another size; its {found.shape[0]} position embeddings were resized to the "
            f"{own.shape[0]} of pretrain.architecture",
            stacklevel=4,
        )


def _in_memory(state: Mapping[str, Any], path: Path) -> Checkpoint:
    return in_memory({name: tensor.float().numpy() for name, tensor in state.items()}, {}, str(path))


def _explain(model: Any, found: Checkpoint, error: Exception) -> None:
    """Raise what is wrong with a checkpoint that does not fit a model."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = found.tensors.keys()
    problems = [f"{n} missing" for n in sorted(own.keys() - names)] + [
        f"{n} unknown" for n in sorted(names - own.keys())
    ]
    shapes = [
        f"{n} is {found.tensors[n].shape}, the architecture's {own[n]}"
        for n in sorted(own.keys() & names)
        if found.tensors[n].shape != own[n]
    ]
    raise WeightsError(
        found.source,
        got=_few(shapes + problems) or " ".join(str(error).split())[:200],
        expected="the tensors of pretrain.architecture",
        cure="name the architecture that the file was trained as",
    ) from error


def load_clip(params: OpenClipPretraining) -> WeightSet:
    """A CLIP of open_clip, both towers, in float32, as a weight set without a head.

    `meta` holds the config as `architecture`, `backbone` {name, pretrained} as the params give them, and `preprocess`
    {size, mean, std, interpolation, resize_mode}: open_clip's defaults, overlaid with those of the tag or the folder.

    Raises:
        ParamsError: an architecture or tag that open_clip does not know, or one for images that are not square.
        DataError: weights that are not on this machine while the hub cannot be reached.
        WeightsError: a file that is damaged or of another architecture.
    """
    import torch

    from modelstock.models.towers import build_clip, tensors_of

    config, path, said = _source(params)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        model = build_clip(config)
    preprocess = _preprocess(model.visual, said, f"pretrain.architecture {params.architecture}")
    if path is not None:
        _load_into(model, path)
    meta = {
        "architecture": config,
        "backbone": {"name": params.architecture, "pretrained": params.pretrained},
        "preprocess": preprocess,
        "parents": [],
        "made_by": {"stage": "pretrain", "options": params.model_dump(mode="json"), "version": __version__},
    }
    clip = WeightSet(tensors_of(model.float()), meta, str(path or f"{params.architecture} with random weights"))
    clip.check_finite()
    return clip


def _build(clip: WeightSet, device: str) -> tuple[Any, Callable[[Sequence[str]], Any]]:
    """A weight set's CLIP in evaluation mode, and its tokenizer."""
    from modelstock.models.towers import build_clip, set_tensors, tokenizer

    config = clip.meta["architecture"]
    folder = Path(str(clip.meta.get("backbone", {}).get("pretrained", "")))
    own = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    tokenize = tokenizer(config, folder if own else None)
    model = build_clip(config)
    set_tensors(model, clip)
    return model.eval().to(device), tokenize


def _head(clip: WeightSet, names: Sequence[str], prompts: Prompts, cache: Path | None, device: str) -> dict[str, Array]:
    """The zero-shot head of a CLIP, from the cache where it holds one."""
    from modelstock.models.towers import zero_shot_head

    config = {k: v for k, v in clip.meta["architecture"].items() if k != "vision_cfg"}
    text = WeightSet({n: t for n, t in clip.tensors.items() if not n.startswith("visual.")})
    key = json.dumps([text.identity, config, device, len(names), prompts_key(names, prompts)], sort_keys=True)
    path = None if cache is None else cache / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
    if path is not None and path.is_file():
        try:
            return dict(load_weights(path).tensors)
        except WeightsError:
            path.unlink()  # damaged: it is only a cache
    weight, bias = zero_shot_head(*_build(clip, device), names, prompts)
    head = WeightSet({"head.weight": weight.numpy(), "head.bias": bias.numpy()}, {}, "zero-shot head")
    if path is not None:
        head.save(path)
    return dict(head.tensors)


def anchor_of(
    clip: WeightSet, names: Sequence[str], prompts: Prompts, *, cache: Path | None = None, device: str = "cpu"
) -> WeightSet:
    """The anchor w0: the image tower of a CLIP with both towers, and the zero-shot head of names and prompts.

    `meta["clip"]` is the CLIP's identity, which every descendant inherits. `cache`: a folder of heads, by what makes
    them. `device`: where texts are encoded.

    Raises:
        ParamsError: no tokenizer for the text tower; see modelstock.models.tokenizer.
        WeightsError: a weight set without a text tower.

    Source: see modelstock.models.zero_shot_head.
    """
    if "architecture" not in clip.meta or "logit_scale" not in clip.tensors:
        raise WeightsError(
            clip.source,
            got="a file without architecture or text tower",
            expected="a CLIP with both towers",
            cure="make it with the stage pretrain, or `modelstock anchor --clip-out`",
        )
    tower = {n: t for n, t in clip.tensors.items() if n.startswith("visual.")}
    tensors = {n: _single(t) for n, t in tower.items()} | _head(clip, names, prompts, cache, device)
    backbone = {"backbone": clip.meta["backbone"]} if "backbone" in clip.meta else {}
    meta = {
        "architecture": clip.meta["architecture"],
        **backbone,
        "clip": clip.identity,
        "preprocess": clip.meta["preprocess"],
        "classes": list(names),
        "classes_sha256": classes_sha256(names),
        "parents": [clip.identity],
        "made_by": {"stage": "anchor", "options": {"templates": len(prompts)}, "version": __version__},
    }
    return WeightSet(tensors, meta, "anchor")


def _single(array: Array) -> Array:
    return array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array


def _read(tensor: StoredTensor) -> Array:
    stored = tensor.read(0, tensor.size)
    values = widen(stored, tensor.dtype).astype(np.float32) if tensor.dtype in FLOATS else stored
    return values.reshape(tensor.shape)


def _tower_prefix(found: Checkpoint, own: Sequence[str]) -> str:
    """What stands before the names of the image tower `own` (without `visual.`) in a checkpoint.

    Raises:
        WeightsError: no such tower in it, or two.
    """
    known, hits = set(own), Counter[str]()
    for name in found.tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if (rest := ".".join(parts[start:])) in known:
                hits[name.removesuffix(rest)] += 1
    whole = sorted(prefix for prefix, count in hits.items() if count == len(known))
    if len(whole) == 1:
        return whole[0]
    if whole:
        got = f"{len(whole)} image towers, under {' and '.join(map(repr, whole))}"
        raise WeightsError(found.source, got=got, expected="one", cure="save the one to merge in a file of its own")
    best = max(sorted(hits), key=lambda prefix: hits[prefix], default="visual.")
    missing = sorted(name for name in known if best + name not in found.tensors)
    raise WeightsError(
        found.source,
        got=f"{len(missing)} of the image tower's {len(known)} tensors missing: "
        f"{_few([best + name for name in missing])}",
        expected="the image tower of the anchor",
        cure="name a checkpoint of the anchor's architecture",
    )


def _own_head(found: Checkpoint, tower: set[str]) -> tuple[str, str] | None:
    """The names of a checkpoint's head, weight and bias, or None."""
    heads = []
    for name in sorted(found.tensors.keys() - tower):
        layer, _, last = name.rpartition(".")
        if last == "weight" and layer.rpartition(".")[2] in _HEADS and len(found.tensors[name].shape) == 2:
            heads.append(layer)
    if len(heads) > 1:
        raise WeightsError(
            found.source, got=f"{len(heads)} heads: {_few(heads)}", expected="one", cure="save it with one of them"
        )
    return (f"{heads[0]}.weight", f"{heads[0]}.bias") if heads else None


def _check_shapes(source: str, shapes: Mapping[str, tuple[str, tuple[int, ...]]], anchor: WeightSet) -> None:
    """Compare shapes, our name -> (the file's name, shape), with the anchor's."""
    wrong = [
        f"{theirs} is {shape}, the anchor's {anchor.tensors[name].shape}"
        for name, (theirs, shape) in sorted(shapes.items())
        if shape != anchor.tensors[name].shape
    ]
    if wrong:
        raise WeightsError(
            source,
            got=_few(wrong),
            expected="the shapes of the anchor",
            cure="name a checkpoint of the anchor's architecture and classes",
        )


def _ours(weights: WeightSet, anchor: WeightSet) -> WeightSet:
    """A weight set of ours, if it merges with the anchor."""
    names, wanted = weights.tensors.keys(), anchor.tensors.keys()
    problems = [f"{n} missing" for n in sorted(wanted - names)] + [f"{n} unknown" for n in sorted(names - wanted)]
    if problems:
        raise WeightsError(
            weights.source,
            got=_few(problems),
            expected="the tensors of the anchor",
            cure="name a weight set made from this anchor",
        )
    _check_shapes(weights.source, {n: (n, t.shape) for n, t in weights.tensors.items()}, anchor)
    theirs, own = weights.meta.get("classes_sha256"), anchor.meta.get("classes_sha256")
    if theirs and own and theirs != own:
        raise WeightsError(
            weights.source,
            got=f"a head for other classes ({theirs[:12]})",
            expected=f"the anchor's ({own[:12]})",
            cure="fine-tune from an anchor with the same classes, in the same order",
        )
    return weights


def adopt(
    path: Path,
    anchor: WeightSet,
    *,
    names: Sequence[str] | None = None,
    prompts: Prompts | None = None,
    device: str = "cpu",
) -> WeightSet:
    """Somebody's fine-tuned checkpoint as a weight set that merges with `anchor`; floats become float32.

    Our own files stay as they are. In others (safetensors, folders, state dicts, training checkpoints, with whatever
    prefix) the image tower is what carries the anchor's names. The head is the file's own linear layer (C, D) over
    normalised features; else zero-shot from its own text tower, if it has one and `names` and `prompts` are given;
    else the anchor's. `meta["made_by"]["options"]["head"]` says which: own, zero-shot or anchor.

    Raises:
        WeightsError: a pickle of more than tensors, a tower or a head that does not fit the anchor, NaN or infinity.
    """
    path = Path(path)
    file = _weights_in(path) if path.is_dir() else path
    found = open_checkpoint(file)
    if "architecture" in found.meta and "head.weight" in found.tensors:
        return _ours(load_weights(file), anchor)
    own = [name.removeprefix("visual.") for name in anchor.tensors if name.startswith("visual.")]
    prefix = _tower_prefix(found, own)
    tower = {f"visual.{name}": prefix + name for name in own}
    head = _own_head(found, set(tower.values()))
    # A file with more in its tower is of another architecture, also where all that the anchor has is there.
    known = {*tower.values(), *(head or ())}
    beside = () if prefix.endswith("visual.") else ("logit_scale", "logit_bias")
    extra = [n for n in sorted(found.tensors.keys() - known) if n.startswith(prefix) and n[len(prefix) :] not in beside]
    if extra:
        raise WeightsError(
            found.source,
            got=f"{_few(extra)} in the image tower",
            expected="the anchor's tensors and no more",
            cure="name a checkpoint of the anchor's architecture",
        )
    places = dict(tower) | ({"head.weight": head[0]} if head else {})
    if head and head[1] in found.tensors:
        places["head.bias"] = head[1]
    _check_shapes(found.source, {n: (p, found.tensors[p].shape) for n, p in places.items()}, anchor)
    tensors = {name: _read(found.tensors[place]) for name, place in places.items()}
    kind = "own" if head else "anchor"
    if head:
        tensors.setdefault("head.bias", np.zeros_like(anchor.tensors["head.bias"]))
    elif names is not None and prompts is not None and (clip := _whole_clip(found, prefix, anchor)) is not None:
        tensors |= _head(clip, names, prompts, None, device)
        kind = "zero-shot"
    else:
        tensors |= {name: anchor.tensors[name] for name in ("head.weight", "head.bias")}
    made = {"stage": "finetune", "source": file.name, "options": {"head": kind}, "version": __version__}
    weights = WeightSet(tensors, {**anchor.meta, "parents": [anchor.identity], "made_by": made}, str(path))
    weights.check_finite()
    return weights


def _whole_clip(found: Checkpoint, prefix: str, anchor: WeightSet) -> WeightSet | None:
    """Both towers of a checkpoint, if it holds the text tower of the anchor's architecture whole."""
    if not prefix.endswith("visual."):
        return None
    import torch

    from modelstock.models.towers import build_clip

    with torch.device("meta"):
        wanted = build_clip(anchor.meta["architecture"]).state_dict()
    start = prefix.removesuffix("visual.")
    fits = all(
        start + name in found.tensors and found.tensors[start + name].shape == tuple(tensor.shape)
        for name, tensor in wanted.items()
    )
    if not fits:
        return None
    return WeightSet({name: _read(found.tensors[start + name]) for name in wanted}, anchor.meta, found.source)
