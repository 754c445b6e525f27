"""The ratio t that implementations of Model Stock apply to small tensors and to filters, beside the exact one.

    python benchmarks/exactness.py [--mergekit PYTHON]

- 768 values, as a LayerNorm of ViT-B has: two updates of cosine 0.45 and falling rms.
- A convolution of four 3x14x14 filters, one ratio a filter, the filters' updates at cosines 0.2, 0.4, 0.6 and 0.8.

Ours is read off a merge; mergekit's off the file that `mergekit-pytorch`, of the environment whose python is given,
writes from the same inputs. "1e-8 added" is the formula of the authors' notebook and of fusion_bench, which add it to
the product of norms, written out here from their published sources.
"""

import argparse
import json
import math
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from modelstock.merging.engine import merge
from modelstock.weights.weight_set import WeightSet, load_weights

RMS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
COSINES = (0.2, 0.4, 0.6, 0.8)


def pair(random: np.random.Generator, size: int, cosine: float, rms: float) -> tuple[np.ndarray, np.ndarray]:
    """Two float32 updates whose cosine is about the one asked for."""
    first, own = random.standard_normal((2, size))
    second = cosine * first + math.sqrt(1 - cosine**2) * own
    return (rms * first).astype(np.float32), (rms * second).astype(np.float32)


def ratio(a: np.ndarray, b: np.ndarray, *, added: float = 0.0) -> float:
    """t for two updates, from exactly rounded sums; `added` is what peers add to the product of norms."""
    dot = math.fsum((a.astype(np.float64) * b).tolist())
    norms = [math.sqrt(math.fsum((v.astype(np.float64) ** 2).tolist())) for v in (a, b)]
    cosine = dot / (norms[0] * norms[1] + added)
    return 2 * cosine / (1 + cosine)


def applied(merged: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """t read off a merged tensor whose anchor is 0."""
    mean = (a.astype(np.float64) + b) / 2
    return float(merged.astype(np.float64) @ mean / (mean @ mean))


def by_mergekit(python: str, sets: list[WeightSet], by_filter: bool) -> WeightSet:
    """The merge that mergekit makes of the same files."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        names = [str(folder / f"{i}.safetensors") for i in range(3)]
        for name, weights in zip(names, sets, strict=True):
            weights.save(Path(name))
        config = {
            "merge_method": "model_stock",
            "base_model": names[0],
            "dtype": "float32",
            "models": [{"model": name} for name in names[1:]],
            "parameters": {"filter_wise": by_filter},
        }
        (folder / "config.yml").write_text(json.dumps(config))
        command = [str(Path(python).parent / "mergekit-pytorch"), str(folder / "config.yml"), str(folder / "out")]
        subprocess.run(command, check=True, capture_output=True)
        return load_weights(next((folder / "out").glob("*.safetensors")))


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", help="the python of an environment with mergekit")
    options = parser.parse_args()
    random = np.random.default_rng(0)
    small = {f"rms {rms:.0e}": pair(np.random.default_rng(1), 768, 0.45, rms) for rms in RMS}
    filters = [pair(random, 3 * 14 * 14, cosine, 1e-3) for cosine in COSINES]
    tensors = [{name: found[i] for name, found in small.items()} for i in range(2)]
    for i in range(2):
        tensors[i]["conv"] = np.stack([f[i] for f in filters]).reshape(4, 3, 14, 14)
    zero = {name: np.zeros_like(value) for name, value in tensors[0].items()}
    sets = [WeightSet(t, source=str(i)) for i, t in enumerate((zero, *tensors))]

    ours = merge("model_stock", sets[0], sets[1:])[0]
    theirs = by_mergekit(options.mergekit, sets, False) if options.mergekit else None
    print("| rms of 768 updates | exact | modelstock | mergekit | 1e-8 added |\n|---|---:|---:|---:|---:|")
    for name, (a, b) in small.items():
        exact, own, added = ratio(a, b), applied(ours.tensors[name], a, b), ratio(a, b, added=1e-8)
        shown = f"{applied(theirs.tensors[name], a, b):.4f}" if theirs else "not run"
        print(f"| {name.removeprefix('rms ')} | {exact:.4f} | {own:.4f} | {shown} | {added:.4f} |")

    ours = merge("model_stock", sets[0], sets[1:], granularity="filter")[0]
    theirs = by_mergekit(options.mergekit, sets, True) if options.mergekit else None
    print("\n| 3x14x14 filter | exact | modelstock | mergekit, over the filter's 42 rows |\n|---|---:|---:|---:|")
    for i, (a, b) in enumerate(filters):
        own = applied(ours.tensors["conv"][i].reshape(-1), a, b)
        shown = "not run"
        if theirs:
            parts = zip(theirs.tensors["conv"][i].reshape(42, 14), a.reshape(42, 14), b.reshape(42, 14), strict=True)
            rows = [applied(merged, x, y) for merged, x, y in parts]
            shown = f"{min(rows):.2f} to {max(rows):.2f}"
        print(f"| cosine {COSINES[i]} | {ratio(a, b):.4f} | {own:.4f} | {shown} |")


if __name__ == "__main__":
    main()
