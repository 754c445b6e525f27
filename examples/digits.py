"""Writes scikit-learn's scans of handwritten digits as folders of images, as own data would lie on disk.

    python examples/digits.py [FOLDER]

train/0 ... train/9 and test/0 ... test/9 hold the scans, every third of each digit in test; `turned` and `noisy` are
the test scans turned by up to 25 degrees either way, and with noise: two shifts. The scans are 1,797 images of 8x8
pixels from the UCI repository (Alpaydin, Kaynak, 1998), enlarged to 32x32.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path) -> None:
    """Write the four sets."""
    scans = load_digits()
    random = np.random.default_rng(0)
    seen = [0] * 10
    for number, (pixels, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        large = Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
        test = seen[digit] % 3 == 2
        seen[digit] += 1
        images = {"test" if test else "train": large}
        if test:
            images["turned"] = large.rotate(float(random.uniform(-25, 25)), Image.Resampling.BICUBIC)
            noise = random.normal(0, 60, (32, 32))
            images["noisy"] = Image.fromarray(np.clip(np.asarray(large) + noise, 0, 255).astype(np.uint8))
        for name, image in images.items():
            path = folder / name / str(digit) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    for name in ("train", "test", "turned", "noisy"):
        print(f"{folder / name}: {sum(1 for _ in (folder / name).rglob('*.png'))} images")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "datasets/digits"))
