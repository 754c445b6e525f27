"""Scoring many weight sets: one pass against a pass each, and against bare forward passes.

    python benchmarks/evaluate.py [--setting NAME]... [--sets N] [--images N] [--rounds N] [--workers N] [--threads N]
                                  [--batch-size N] [--device cpu|cuda] [--precision float32|bfloat16] [--no-usual]

Three settings, all or those that are named, of `sets` weight sets each:
- photographs: `images` JPEGs of 500x375, and a tower of 0.8M parameters: decoding binds, as it does on a GPU.
- shapes: four times as many of the embedded benchmark's own images of 32x32, and the same tower.
- vit-b-32: the photographs and a ViT-B/32: the tower binds on a CPU.

- usual: for each weight set, open_clip's transform in a torch DataLoader over the same files, and accuracy. Left out
  by --no-usual.
- ours: modelstock.scoring.one_pass.score, with everything it does: shards checked by hash, all metrics, no cache. All
  towers are in memory together, each with its own copy of its weights, and each batch goes through all of them.
- bare: the towers' forward passes on batches that are normalised and in memory, and nothing else. One tower is in
  memory at a time, and all batches go through it before the next is built.
- kept: bare, within `modelstock.scoring.memory.memory_kept` as ours is; the hardware's speed.

All use the same batch size, threads, decoding processes and device, and build their models within the time. The
variants take turns, `rounds` times; a figure is the median over rounds. Their predictions are compared. Processor time
is that of all threads of this process, and says more than elapsed time where a machine has other work; faults are
pages that the system had to find and clear, per image and weight set.
"""

import argparse
import io
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from vit import CONFIG, PREPROCESS

from modelstock.data.dataset import open_dataset
from modelstock.data.manifest import make_manifest, save_manifest
from modelstock.data.shapes.names import NAMES, TINY_PREPROCESS
from modelstock.data.shapes.render import draw
from modelstock.data.shards import write_shard
from modelstock.models.towers import TINY_CLIP, build_classifier, build_visual, tensors_of
from modelstock.scoring.memory import memory_kept
from modelstock.scoring.one_pass import ScoringOptions, score
from modelstock.scoring.outcome import Outcome
from modelstock.weights.weight_set import WeightSet, classes_sha256

VARIANTS = ("usual", "ours", "bare", "kept")


def weight_sets(config: dict, preprocess: dict, count: int) -> list[WeightSet]:
    """`count` classifiers of one architecture with random weights; only their heads differ, which costs no memory."""
    torch.manual_seed(0)
    tower = {f"visual.{name}": value for name, value in tensors_of(build_visual(config)).items()}
    random = np.random.default_rng(0)
    meta = {"architecture": config, "preprocess": preprocess, "classes_sha256": classes_sha256(NAMES)}
    weights = []
    for number in range(count):
        head = random.standard_normal((len(NAMES), config["embed_dim"])).astype(np.float32)
        tensors = {**tower, "head.weight": head, "head.bias": np.zeros(len(NAMES), np.float32)}
        weights.append(WeightSet(tensors, meta, f"{number}"))
        _ = weights[-1].identity  # reading and hashing files belongs to neither side
    return weights


def photographs(count: int) -> list[tuple[str, bytes]]:
    """JPEGs of 500x375 as a camera writes them: large shapes, fine texture, about 70 KB."""
    random, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(random.integers(0, 255, (38, 50, 3), np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(int)
        pixels = np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "jpeg", quality=90)
        files.append(("jpg", buffer.getvalue()))
    return files


def shapes(count: int) -> list[tuple[str, bytes]]:
    """The embedded benchmark's images, as its shards hold them."""
    files = []
    for image in draw("shapes", range(count), seed=0)[0]:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png", compress_level=1)
        files.append(("png", buffer.getvalue()))
    return files


def shards(folder: Path, files: Sequence[tuple[str, bytes]]) -> Path:
    """The files as one folder of shards, labels in turn."""
    folder.mkdir()
    written = []
    for number, start in enumerate(range(0, len(files), 1000)):
        part = [(i, i % len(NAMES), *files[i]) for i in range(start, min(start + 1000, len(files)))]
        written.append(write_shard(folder / f"{number:06d}.tar", part))
    manifest = make_manifest(
        benchmark=folder.name,
        role="shift",
        labels=NAMES,
        label_groups=[[i] for i in range(len(NAMES))],
        classes=NAMES,
        shards=[shard for shard in written if shard],
    )
    save_manifest(folder, manifest)
    return folder


class Files(Dataset):
    """What an ImageFolder gives: an image through open_clip's transform, and its label."""

    def __init__(self, files: Sequence[tuple[str, bytes]], preprocess: dict) -> None:
        self._files = files
        self._transform = open_clip.image_transform(
            preprocess["size"], is_train=False, mean=preprocess["mean"], std=preprocess["std"]
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        return self._transform(Image.open(io.BytesIO(self._files[row][1]))), row % len(NAMES)


def dtype_of(options: argparse.Namespace) -> torch.dtype:
    """That of the towers."""
    return torch.bfloat16 if options.precision == "bfloat16" else torch.float32


@torch.inference_mode()
def usual(
    sets: Sequence[WeightSet], files: Sequence[tuple[str, bytes]], options: argparse.Namespace
) -> list[np.ndarray]:
    """A pass for each weight set; predictions."""
    predictions = []
    for weights in sets:
        model = build_classifier(weights).to(options.device, dtype_of(options))
        loader = DataLoader(
            Files(files, weights.meta["preprocess"]),
            batch_size=options.batch_size,
            num_workers=options.workers,
            pin_memory=options.device == "cuda",
        )
        guesses, hits = [], 0
        for images, labels in loader:
            guess = model(images.to(options.device, dtype_of(options), non_blocking=True)).argmax(dim=1).cpu()
            hits += int((guess == labels).sum())
            guesses.append(guess)
        predictions.append(torch.cat(guesses).numpy())
    return predictions


def ours(sets: Sequence[WeightSet], folder: Path, options: argparse.Namespace) -> dict[str, Outcome]:
    """One pass over shards that are checked first; outcomes by identity."""
    names = ("batch_size", "workers", "device", "precision")
    scoring = ScoringOptions(**{name: getattr(options, name) for name in names})
    return score(open_dataset(folder), sets, options=scoring)


@torch.inference_mode()
def bare(sets: Sequence[WeightSet], pixels: torch.Tensor, options: argparse.Namespace) -> None:
    """Nothing but forward passes."""
    for weights in sets:
        model = build_classifier(weights).to(options.device, dtype_of(options))
        for batch in pixels.split(options.batch_size):
            model(batch)
    if options.device == "cuda":
        torch.cuda.synchronize()


def kept(sets: Sequence[WeightSet], pixels: torch.Tensor, options: argparse.Namespace) -> None:
    """The same with the memory of activations kept between layers."""
    with memory_kept(options.device):
        bare(sets, pixels, options)


def used() -> np.ndarray:
    """Elapsed time and processor time in seconds, and page faults, so far."""
    return np.array(
        [time.perf_counter(), time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt], float
    )


def measure(
    name: str, config: dict, preprocess: dict, files: Sequence[tuple[str, bytes]], options: argparse.Namespace
) -> str:
    """One row of the table."""
    sets, data = weight_sets(config, preprocess, options.sets), Files(files, preprocess)
    pixels = torch.stack([data[i][0] for i in range(len(files))]).to(options.device, dtype_of(options))
    with tempfile.TemporaryDirectory() as temporary:
        folder = shards(Path(temporary) / "images", files)
        call: dict[str, Callable[[], object]] = {
            "usual": lambda: usual(sets, files, options),
            "ours": lambda: ours(sets, folder, options),
            "bare": lambda: bare(sets, pixels, options),
            "kept": lambda: kept(sets, pixels, options),
        }
        if not options.usual:
            del call["usual"]
        costs: dict[str, list[np.ndarray]] = {variant: [] for variant in call}
        bare(sets[:1], pixels, options)
        for _ in range(options.rounds):
            results = {}
            for variant, function in call.items():
                begun = used()
                results[variant] = function()
                costs[variant].append(used() - begun)

    def median(values: Sequence[float]) -> float:
        return statistics.median(values)

    cells = [name, f"{len(files)}"]
    cells += [f"{median([cost[0] for cost in costs[variant]]):.1f}" if variant in costs else "" for variant in VARIANTS]
    for over, unit in (("usual", 0), ("bare", 0), ("bare", 1), ("kept", 1)):
        pairs = zip(costs.get(over, ()), costs["ours"], strict=False)
        ratios = [float(a[unit] / b[unit]) for a, b in pairs]
        cells.append(f"{median(ratios):.2f}" if ratios else "")
    forward = len(files) * len(sets)
    cells.append(" / ".join(f"{median([c[2] for c in costs[v]]) / forward:.0f}" for v in VARIANTS[1:]))
    agree = [
        (results["ours"][w.identity].prediction == guess).mean()
        for w, guess in zip(sets, results.get("usual", ()), strict=False)
    ]
    cells.append(f"{100 * np.mean(agree):.2f} %" if agree else "")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", action="append", choices=["photographs", "shapes", "vit-b-32"])
    for name, value in (
        ("sets", 20),
        ("images", 512),
        ("rounds", 3),
        ("workers", 0),
        ("threads", 2),
        ("batch-size", 64),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--usual", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pictures, drawn = photographs(options.images), shapes(4 * options.images)
    settings = {
        "photographs": lambda: measure("tiny tower, photographs", TINY_CLIP, TINY_PREPROCESS, pictures, options),
        "shapes": lambda: measure("tiny tower, shapes", TINY_CLIP, TINY_PREPROCESS, drawn, options),
        "vit-b-32": lambda: measure("ViT-B/32, photographs", CONFIG, PREPROCESS, pictures, options),
    }
    lines = [settings[name]() for name in options.setting or settings]
    print(
        f"\n{options.sets} weight sets, {platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, "
        f"{options.workers} decoding processes, {options.device}, {options.precision}, batch {options.batch_size}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, medians of {options.rounds}\n"
    )
    columns = ["", "images", *(f"{variant}, s" for variant in VARIANTS), "usual / ours", "bare / ours"]
    columns += [f"{over} / ours, processor time" for over in ("bare", "kept")]
    columns += ["faults per forward of an image: ours / bare / kept", "same predictions"]
    print(f"| {' | '.join(columns)} |")
    print("|---|" + "---:|" * (len(columns) - 1))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
