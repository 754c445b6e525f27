"""Fine-tunes one seed from the anchor; killed at any moment and run again, it ends with the same bytes."""

import contextlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstock import __version__
from modelstock.data.classes import templates
from modelstock.data.dataset import open_dataset
from modelstock.data.examples import Examples
from modelstock.devices import deterministic
from modelstock.files import atomic_path
from modelstock.models.adopt import adopt_seed
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.params import FinetuneParams, Params, load_params
from modelstock.provenance import key_of
from modelstock.tracking.history import write_history
from modelstock.tracking.mlflow import Mirror, Tracker
from modelstock.training.distributed import World, processes
from modelstock.training.finetune import finetune
from modelstock.weights.weight_set import WeightSet, load_weights
from stages import run


@dataclass(frozen=True)
class Inputs:
    """What training reads: the anchor, examples, and what identifies them."""

    anchor: WeightSet
    train: Examples
    held_out: Examples
    identities: Mapping[str, str]


def read_inputs(params: Params, anchor: Path, train: Path, held_out: Path) -> Inputs:
    """Read the anchor and both splits, and check that they belong together."""
    start, datasets = load_weights(anchor), {"train": open_dataset(train), "held-out": open_dataset(held_out)}
    datasets["train"].check_classes(start)
    examples = [dataset.examples(in_memory=params.loading.in_memory) for dataset in datasets.values()]
    identities = {"anchor": start.identity} | {name: d.manifest.sha256 for name, d in datasets.items()}
    return Inputs(start, *examples, identities)


def mirror(params: Params, world: World, folder: Path, key: str, name: str, facts: Mapping[str, Any]) -> Any:
    """The live mirror in MLflow of the first process's history; nothing for the others."""
    if world.rank:
        return contextlib.nullcontext()
    return Mirror(
        lambda: Tracker(Path.cwd(), params.tracking.experiment),
        folder / "history.jsonl",
        key=key,
        name=name,
        params=facts,
    )


def train_seed(
    params: Params,
    recipe: FinetuneParams,
    made: Mapping[str, Any],
    name: str,
    paths: tuple[Path, Path, Path],
    out: Path,
) -> None:
    """Train `made["seed"]` by `recipe`, and write its weight sets and history; `made` says what it is."""
    deterministic(params.threads)
    with processes(recipe.devices, params.device, f"stages.{made['stage']}") as world:
        inputs = read_inputs(params, *paths)
        options = recipe.model_dump(mode="json")
        key = key_of(
            "modelstock.training.finetune",
            options,
            made,
            inputs.identities,
            {"threads": params.threads, "device": world.device.type},
        )
        meta = {**inputs.anchor.meta, "parents": [inputs.anchor.identity]}
        made = {**made, "options": options, "version": __version__}
        model, folder = build_classifier(inputs.anchor).to(world.device), Path("scratch") / made["stage"] / key

        def snapshot(epoch: int) -> None:
            about = {**made, "average": "snapshot", "options": {**options, "epoch": epoch}}
            weights = WeightSet(tensors_of(model), {**meta, "made_by": about}, f"{name}, epoch {epoch}")
            weights.save(folder / f"epoch-{epoch}.safetensors")

        facts = {k: v for k, v in made.items() if k not in ("options", "version")}
        facts |= {f"options.{k}": v for k, v in options.items()}
        with mirror(params, world, folder, key, name, facts):
            history, averages = finetune(
                model,
                inputs.train,
                inputs.held_out,
                recipe,
                inputs.anchor.meta["preprocess"],
                seed=made["seed"],
                folder=folder,
                workers=params.loading.workers,
                world=world,
                snapshot=snapshot if recipe.snapshots else None,
            )
        if world.rank:
            return
        final = tensors_of(model)
        WeightSet(final, {**meta, "made_by": {**made, "key": key}}, name).save(out / "weights.safetensors")
        for average in averages:
            tensors = {**final, **{k: t.cpu().numpy() for k, t in average.tensors().items()}}
            about = {**made, "average": average.name.split("-")[0], "options": {**options, **average.options}}
            WeightSet(tensors, {**meta, "made_by": about}, name).save(out / f"{average.name}.safetensors")
        for epoch in range(1, recipe.head_first_epochs + recipe.epochs if recipe.snapshots else 0):
            kept = folder / f"epoch-{epoch}.safetensors"
            with atomic_path(out / kept.name) as temporary:
                shutil.copyfile(kept, temporary)
        write_history(out, history)
        print(f"{name}: held-out accuracy {100 * history[-1]['validation/top1']:.1f} %")


def adopted(params: Params, seed: int, anchor: Path, out: Path) -> bool:
    """Whether `checkpoints` brings this seed's weights: then they are written to `out` with no history."""
    source = params.checkpoint_of(seed)
    if source is None:
        return False
    deterministic(params.threads)
    start, prompts = load_weights(anchor), templates(params.classes)
    with processes(1, params.device, "stages.finetune") as world:
        weights = adopt_seed(source, start, seed=seed, prompts=prompts, device=world.device.type)
    weights.save(out / "weights.safetensors")
    head = weights.meta["made_by"]["options"]["head"]
    write_history(out, [])
    print(f"seed-{seed}: {source} adopted with the {head} head, identity {weights.identity[:12]}; no training")
    return True


def main(seed: int, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """SEED; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    if adopted(params, seed, anchor, out):
        return
    made = {"stage": "finetune", "seed": seed}
    train_seed(params, params.finetune, made, f"seed-{seed}", (anchor, train, held_out), out)


if __name__ == "__main__":
    run(main)
