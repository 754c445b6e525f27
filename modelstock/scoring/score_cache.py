"""Outcomes on disk, so that what is scored is not scored again, and an interrupted pass goes on where it was.

A file is named by everything that could change a bit of its outcome: tensors, architecture, preprocessing, settings,
and, as folders above it, the data, and the code and libraries that score. After a change of either, nothing old is
used; when a pass over the data finishes, the folders of other code or libraries are removed, so that a cache does not
grow with every change.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelstock.files import dump_json
from modelstock.provenance import key_of
from modelstock.scoring.outcome import Outcome
from modelstock.weights.weight_set import WeightSet

CODE = "modelstock.scoring.one_pass"
DESCRIBED = ("architecture", "preprocess")  # what a weight set's metadata say of how its tensors are scored


def ensemble_identity(members: Sequence[str]) -> str:
    """The identity of a logit ensemble: a hash of its members' identities, in no order."""
    return hashlib.sha256(("logit ensemble\n" + "\n".join(sorted(members))).encode()).hexdigest()


class Progress:
    """The outcome so far of one weight set or ensemble; read from `path`, and kept there, where it is given."""

    def __init__(self, path: Path | None, *, count: int, batch_size: int) -> None:
        self._path, self._count = path, count
        stored = None if path is None else Outcome.load(path)
        usable = stored is not None and (
            len(stored) == count or (len(stored) < count and len(stored) % batch_size == 0)
        )
        self._parts = [stored] if stored is not None and usable else []
        self.scored = self._saved = sum(len(part) for part in self._parts)

    @property
    def finished(self) -> bool:
        """Whether every example is scored."""
        return self.scored >= self._count

    @property
    def outcome(self) -> Outcome:
        """On all examples so far."""
        self._parts = [Outcome.joined(self._parts)]
        return self._parts[0]

    def add(self, part: Outcome) -> None:
        """The outcome on the next examples."""
        self._parts.append(part)
        self.scored += len(part)

    def keep(self) -> None:
        """Write what is new to the cache."""
        if self._path is not None and self.scored > self._saved:
            self.outcome.save(self._path)
            self._saved = self.scored


class ScoreCache:
    """The files of one benchmark's outcomes under `root`; without a root, nothing is kept.

    `data`: the data's sha256. `settings`: of the pass, those that could change a bit.
    """

    def __init__(self, root: Path | None, data: str, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._all = None if root is None else root / data[:24]
        self._current = None if self._all is None else self._all / key_of(CODE, {"data": data})

    def key(self, weights: WeightSet) -> str:
        """The name of a weight set's outcome."""
        parts = {name: weights.meta.get(name) for name in DESCRIBED}
        return hashlib.sha256((weights.identity + dump_json({**parts, **self._settings})).encode()).hexdigest()

    def path(self, key: str) -> Path | None:
        """Where the outcome of this name is kept."""
        return None if self._current is None else self._current / f"{key}.safetensors"

    def remove_outdated(self) -> None:
        """Remove what other code or other libraries scored on the same data."""
        if self._all is None or not self._all.is_dir():
            return
        for path in self._all.iterdir():
            if path.is_dir() and path != self._current:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".safetensors":
                path.unlink(missing_ok=True)
