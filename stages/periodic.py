"""Trains seeds side by side, merged by Model Stock on the way; resumes like one seed, with the same bytes."""

from pathlib import Path

from modelstock import __version__
from modelstock.devices import deterministic
from modelstock.files import write_json
from modelstock.models.towers import build_classifier, tensors_of
from modelstock.params import load_params
from modelstock.provenance import key_of
from modelstock.tracking.history import write_history
from modelstock.training.distributed import processes
from modelstock.training.periodic import train_periodic
from modelstock.weights.weight_set import WeightSet
from stages import run
from stages.finetune import mirror, read_inputs


def main(size: int, anchor: Path, train: Path, held_out: Path, out: Path) -> None:
    """SIZE: how many seeds; ANCHOR: a weight set; TRAIN, HELD_OUT: folders of shards; OUT: the folder to write."""
    params = load_params()
    deterministic(params.threads)
    with processes(params.periodic.devices, params.device, "stages.periodic") as world:
        inputs = read_inputs(params, anchor, train, held_out)
        seeds = params.seeds[:size]
        recipe = params.finetune.model_dump(mode="json", exclude={"ema", "lawa", "snapshots", "devices"})
        merging = params.periodic.model_dump(mode="json", exclude={"sizes", "devices"})
        made = {"stage": "periodic", "method": "periodic", "members": seeds, "options": {**recipe, **merging}}
        key = key_of(
            "modelstock.training.periodic",
            made,
            inputs.identities,
            {"threads": params.threads, "device": world.device.type},
        )
        name, folder = f"periodic/{'-'.join(map(str, seeds))}", Path("scratch/periodic") / key
        facts = {"stage": "periodic", "members": "-".join(map(str, seeds))}
        facts |= {f"options.{k}": v for k, v in made["options"].items()}
        with mirror(params, world, folder, key, name, facts):
            model, history, reports = train_periodic(
                inputs.anchor,
                lambda: build_classifier(inputs.anchor).to(world.device),
                inputs.train,
                inputs.held_out,
                params.finetune,
                params.periodic,
                seeds=seeds,
                folder=folder,
                workers=params.loading.workers,
                world=world,
            )
        if world.rank:
            return
        made |= {"version": __version__, "key": key}
        meta = {**inputs.anchor.meta, "parents": [inputs.anchor.identity], "made_by": made}
        WeightSet(tensors_of(model), meta, name).save(out / "weights.safetensors")
        write_history(out, history)
        write_json(out / "report.json", reports)
        print(f"{name}: {len(reports)} merges, held-out accuracy {100 * history[-1]['validation/top1']:.1f} %")


if __name__ == "__main__":
    run(main)
