"""The ratio t that implementations of Model Stock give a small tensor, beside the exact one.

    python benchmarks/small_tensors.py

768 values, as a LayerNorm of ViT-B has, two updates of cosine 0.45 and falling rms. The peers' formulas are written out
from their published sources, since each needs a framework around it: mergekit (`model_stock.py`) clamps the product of
norms at 1e-6; the authors' notebook and fusion_bench add 1e-8 to it.
"""

import math

import numpy as np

from modelstock.merging import merge
from modelstock.weights import WeightSet


def main() -> None:
    """Print the table as Markdown."""
    random = np.random.default_rng(0)
    first, own = random.standard_normal((2, 768))
    second = 0.45 * first + math.sqrt(1 - 0.45**2) * own
    print("| rms of the updates | exact | modelstock | norms clamped at 1e-6 | 1e-8 added |\n|---|---:|---:|---:|---:|")
    for rms in (1e-3, 1e-4, 1e-5, 1e-6, 1e-7):
        a, b = ((rms * v).astype(np.float32) for v in (first, second))
        dot = math.fsum((a.astype(np.float64) * b).tolist())
        norms = [math.sqrt(math.fsum((v.astype(np.float64) ** 2).tolist())) for v in (a, b)]
        sets = [WeightSet({"w": w}, source=str(i)) for i, w in enumerate((np.zeros(768, np.float32), a, b))]
        ours = merge("model_stock", sets[0], sets[1:])[1]["w"]["ratio"]
        product = norms[0] * norms[1]
        ratios = [2 * c / (1 + c) for c in (dot / product, dot / max(product, 1e-6), dot / (product + 1e-8))]
        print(f"| {rms:.0e} | {ratios[0]:.4f} | {ours:.4f} | {ratios[1]:.4f} | {ratios[2]:.4f} |")


if __name__ == "__main__":
    main()
