"""modelstock: fine-tune a CLIP model a few times, merge the results, and know which merge to ship.

Merging in memory:

    from pathlib import Path

    from modelstock.merging.engine import merge
    from modelstock.weights.weight_set import load_weights

    anchor, *tuned = (load_weights(Path(f"{name}.safetensors")) for name in ("anchor", "a", "b"))
    merged, report = merge("model_stock", anchor, tuned)
    merged.save(Path("merged.safetensors"))

The command `modelstock` does the same for files of any size. Packages, from the ground up: `weights`, `tracking`,
`merging`, `data`, `models`, `scoring`, `training`, `comparison`, `experiment`, `cli`. `modelstock.errors` has the
errors that a user can meet. Only `weights` and `merging` do without the extra `train`.
"""

import os

__version__ = "0.1.0"

# Rounds that threads of torch spin while they wait for each other, before they sleep; GNU's OpenMP reads it when it is
# loaded. Its own 300,000 win nothing where the cores are free, and cost several times the time where others want them;
# see docs/benchmarks.md, "Threads that wait". No result depends on it.
SPIN_COUNT = "3000"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
