"""What a weight set is called in tables, from what its file says of itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from modelstock.errors import WeightsError
from modelstock.scoring.results import Row
from modelstock.scoring.score_cache import ensemble_identity
from modelstock.weights.weight_set import WeightSet

# The option that tells averages and snapshots of one seed apart.
AVERAGES = {"ema": "ema_decay", "lawa": "lawa_last", "snapshot": "epoch"}


def row_of(weights: WeightSet) -> Row:
    """The row of a weight set: its name, kind, members and options.

    Raises:
        WeightsError: metadata that do not say how it was made.
    """
    made_by: Mapping[str, Any] = weights.meta.get("made_by", {})
    try:
        return _row(weights, made_by)
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            weights.source,
            got=f"made_by {str(dict(made_by))[:80]} ({type(error).__name__}: {error})",
            expected="what a stage writes of how it made a weight set",
            cure="make it again with its stage",
        ) from error


def _row(weights: WeightSet, made_by: Mapping[str, Any]) -> Row:
    by_stage = {"anchor": _anchor, "finetune": _seed, "variant": _variant, "longer": _longer, "periodic": _periodic}
    name, kind, members, options = by_stage.get(made_by["stage"], _merge)(made_by)
    return Row(name=name, identity=weights.identity, kind=kind, members=members, options=options)


def ensemble_row(members: tuple[int, ...], identities: Sequence[str]) -> Row:
    """The row of the logit ensemble of these seeds."""
    identity = ensemble_identity(identities)
    return Row(name=f"ensemble/{_joined(members)}", identity=identity, kind="ensemble", members=members, options={})


Description = tuple[str, str, tuple[int, ...], Mapping[str, Any]]  # name, kind, members, options


def _joined(members: Sequence[int]) -> str:
    return "-".join(map(str, members))


def _anchor(made_by: Mapping[str, Any]) -> Description:
    head = made_by["options"].get("head")  # a zero-shot head is of prompts, and says nothing
    return "anchor", "anchor", (), {"head": head} if head else {}


def _seed(made_by: Mapping[str, Any]) -> Description:
    seed, average = int(made_by["seed"]), made_by.get("average")
    if average is None:
        return f"seed-{seed}", "seed", (seed,), _epochs(made_by)
    option = AVERAGES[average]
    value = made_by["options"][option]
    return f"{average}@{value}/{seed}", average, (seed,), {option: value}


def _variant(made_by: Mapping[str, Any]) -> Description:
    seed, pool, average = int(made_by["seed"]), made_by["pool"], made_by.get("average")
    if average is None:
        return f"{pool}/{made_by['variant']}", pool, (seed,), _epochs(made_by)
    option = AVERAGES[average]
    value = made_by["options"][option]
    options = {option: value, **_epochs(made_by)}
    return f"{pool}-{average}@{value}/{made_by['variant']}", f"{pool}-{average}", (seed,), options


def _epochs(made_by: Mapping[str, Any]) -> dict[str, float]:
    """How many epochs of the whole training set a run takes, from which its cost follows; adopted checkpoints: none."""
    recipe = made_by.get("options", {})
    return {"epochs": recipe["epochs"] * recipe.get("share", 1)} if "epochs" in recipe else {}


def _longer(made_by: Mapping[str, Any]) -> Description:
    seed, factor = int(made_by["seed"]), made_by["factor"]
    return f"longer@{factor}/{seed}", "longer", (seed,), {"factor": factor}


def _periodic(made_by: Mapping[str, Any]) -> Description:
    kind, members = f"periodic-{made_by['arm']}", tuple(map(int, made_by["members"]))
    return f"{kind}/{_joined(members)}", kind, members, made_by["options"]


def _merge(made_by: Mapping[str, Any]) -> Description:
    members, options, method = tuple(map(int, made_by["members"])), made_by["options"], made_by["method"]
    value = f"@{options[made_by['chosen']]}" if "chosen" in made_by else ""
    return f"{method}/{_joined(members)}{value}", method, members, options
