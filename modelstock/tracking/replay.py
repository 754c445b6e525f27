"""A whole comparison, sent to a tracker; as often as one likes, for what is there is not added again."""

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from modelstock.tracking.tracker import Measurements, Tracker
from modelstock.weights.weight_set import load_weights


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row of a comparison.

    `weights`: its file; None for what has scores but no weights, such as an ensemble, which `params` describe.
    """

    name: str
    identity: str
    measurements: Measurements
    weights: Path | None = None
    params: Mapping[str, Any] = field(default_factory=dict)


def replay(tracker: Tracker, records: Sequence[Record], *, model_name: str, champion: str, root: Path) -> None:
    """Send every record, register every weight set, and give the champion's the alias `champion`.

    Rows with the same tensors are one run, tagged with all their names. `root`: the project's folder, whose git commit
    and dvc.lock lead back to the inputs.

    Raises:
        TrackingError: the tracker does not answer.
    """
    commit, hashes = git_commit(root), dvc_hashes(root)
    same: dict[str, list[Record]] = {}
    for record in records:
        same.setdefault(record.identity, []).append(record)
    for identity, rows in same.items():
        names = [row.name for row in rows]
        tags = {"modelstock.names": ", ".join(names), **({"git.commit": commit} if commit else {})}
        first = rows[0]
        if first.weights is None:
            tracker.record_scores(
                identity, name=first.name, measurements=first.measurements, tags=tags, params=first.params
            )
            continue
        output = next((path for path in (str(first.weights), str(first.weights.parent)) if path in hashes), None)
        tags |= {"dvc.md5": hashes[output]} if output else {}
        key = load_weights(first.weights, lazy=True).meta["made_by"].get("key")
        history = first.weights.with_name("history.jsonl")
        tracker.record(
            first.weights,
            name=first.name,
            measurements=first.measurements,
            tags=tags,
            key=key,
            history=history if key and history.exists() else None,
        )
        tracker.register(identity, model_name=model_name, alias="champion" if champion in names else None)


def git_commit(root: Path) -> str | None:
    """The commit of a git checkout; None where this is none."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None


def dvc_hashes(root: Path) -> dict[str, str]:
    """Output path -> its hash, from dvc.lock."""
    lock = root / "dvc.lock"
    stages = (YAML(typ="safe").load(lock.read_text()) or {}).get("stages", {}) if lock.exists() else {}
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
