"""What a GPU computes, and how fast: the tests marked `gpu`, then a ViT-B/32 in training and in scoring.

    python benchmarks/gpu.py [--device cuda|cpu] [--workers N] [--rounds N] [--no-tests]

`make gpu-check`, or by itself with the library on PYTHONPATH. It prints one table at the end: the card, driver and
versions; the tests; images per second, and the share of the card's peak that they are, of which there are two: that of
the data sheet, and what a large matrix product reaches on the spot. Floating-point operations are counted by torch. It
ends with status 0 where the tests pass, 1 where one fails, and 2, with one line, where there is no GPU or something to
import is lacking. `--device cpu` rehearses it all on a CPU, with tiny sizes, without tests and for no figures.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What the tests and the benchmarks import, beside the standard library.
NEEDED = ["ftfy", "numpy", "open_clip", "PIL", "psutil", "pydantic", "pytest", "ruamel.yaml", "safetensors", "timm"]
NEEDED += ["torch", "torchvision", "tqdm"]

# Dense bfloat16 with float32 sums, TFLOP/s, without sparsity, as the cards' data sheets by NVIDIA have it (where they
# give the figure with sparsity alone, half of it); float16 for those that have no bfloat16. First match wins.
PEAKS = [
    (r"H200 NVL", 835.0),
    (r"H200", 989.0),
    (r"H100 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"H100", 989.0),
    (r"A100", 312.0),
    (r"L40S", 362.0),
    (r"L4\b", 121.0),
    (r"A10\b", 125.0),
    (r"RTX 4090$", 165.0),
    (r"V100-PCIE", 112.0),
    (r"V100", 125.0),
    (r"T4\b", 65.0),
]


def peak_of(card: str) -> float | None:
    """TFLOP/s of the data sheet, None for a card that is not in the table."""
    return next((peak for pattern, peak in PEAKS if re.search(rf"\b{pattern}", card)), None)


def lacking() -> list[str]:
    """What cannot be imported here."""
    return [name for name in NEEDED if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Images per second of something, and the floating-point operations of one image."""

    name: str
    images: float
    flops: int

    def row(self, peaks: Sequence[float | None]) -> str:
        """A row of the table; `peaks`: in TFLOP/s."""
        reached = self.images * self.flops / 1e12
        shares = ["" if peak is None else f"{100 * reached / peak:.1f} %" for peak in peaks]
        return f"| {self.name} | {self.images:,.0f} images per second | {reached:.3g} | {' | '.join(shares)} |"


def environment() -> dict[str, str]:
    """That of the processes it starts: the library is found."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def shown(command: Sequence[object]) -> tuple[int, list[str]]:
    """Run a command of python, showing what it prints as it does; its status and its lines."""
    print(f"\n$ python {' '.join(map(str, command))}", flush=True)
    lines = []
    with subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, lines


def tables(lines: Sequence[str]) -> list[dict[str, str]]:
    """The rows of Markdown tables in what was printed, by their columns' names."""
    rows, header = [], []
    for line in lines:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells or set(line) <= set("|-: "):
            header = header if cells else []
        elif not header:
            header = cells
        else:
            rows.append(dict(zip(header, cells, strict=False)))
    return rows


def number(text: str) -> float:
    return float(text.replace(",", "").split()[0])


def product_peak(device: str) -> float:
    """TFLOP/s of a matrix product of random numbers, 8192 a side on a GPU."""
    import torch
    from vit import synchronize

    old = device == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    side, dtype = (8192 if device == "cuda" else 512), torch.float16 if old else torch.bfloat16
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * side**3 / (time.perf_counter() - begun) / 1e12


def forward_rates(device: str, batch_size: int) -> list[Rate]:
    """A forward pass of a ViT-B/32 in each precision, as scoring measures it to choose one."""
    import torch
    import vit

    from modelstock.models.towers import tensors_of
    from modelstock.scoring.precision import speeds
    from modelstock.weights.weight_set import WeightSet

    meta = {"architecture": vit.CONFIG, "preprocess": vit.PREPROCESS}
    weights = WeightSet(tensors_of(vit.classifier("cpu")), meta, "ViT-B/32")
    measured = speeds(weights, device, batch_size=batch_size)
    if device == "cuda":
        torch.cuda.empty_cache()  # for the processes that come
    flops = vit.flops(training=False)
    return [
        Rate(name=f"forward, {name}, batch {batch_size}", images=rate, flops=flops) for name, rate in measured.items()
    ]


def training_rates(options: argparse.Namespace, sizes: Sequence[object]) -> list[Rate]:
    """A ViT-B/32 in training, by benchmarks/train.py."""
    import vit

    command = ["benchmarks/train.py", "--setting", "vit-b-32", "--device", options.device, *sizes]
    status, lines = shown([*command, "--workers", options.workers, "--rounds", options.rounds])
    if status:
        return []
    flops = vit.flops(training=True)
    return [
        Rate(name=f"training, bfloat16: {row['']}", images=number(row["images per second"]), flops=flops)
        for row in tables(lines)
    ]


def scoring_rates(options: argparse.Namespace, sets: int, sizes: Sequence[object]) -> list[Rate]:
    """A pass of several weight sets over photographs, from JPEGs to outcomes, by benchmarks/evaluate.py."""
    import vit

    command = ["benchmarks/evaluate.py", "--setting", "vit-b-32", "--device", options.device]
    command += ["--precision", "bfloat16", "--sets", str(sets), *map(str, sizes)]
    status, lines = shown(
        [*command, "--workers", options.workers, "--threads", options.threads, "--rounds", options.rounds]
    )
    rows = [row for row in tables(lines) if "ours, s" in row and "images" in row]
    if status or not rows:
        return []
    flops, rates = vit.flops(training=False), []
    for column, name in (("ours, s", "one pass"), ("usual, s", "a pass each, as usual")):
        if rows[-1].get(column):
            images = sets * number(rows[-1]["images"]) / max(number(rows[-1][column]), 0.05)
            rates.append(Rate(name=f"scoring {sets} weight sets, bfloat16: {name}", images=images, flops=flops))
    return rates


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("torch", "torchvision", "timm", "open_clip_torch", "numpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} of an unknown version")
    return ", ".join(found)


def main() -> int:
    """Test, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=max(1, min(12, cores - 2)))
    parser.add_argument("--threads", type=int, default=max(1, min(8, cores // 2)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    missing = lacking()
    if missing:
        print(f"gpu-check: cannot import {', '.join(missing)}: install them, or put them on PYTHONPATH")
        return 2
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        print(f"gpu-check: no GPU that torch can use: torch {torch.__version__}, {built}, driver {driver()}")
        return 2
    rehearsal = options.device == "cpu"
    status, tests = 0, "not run"
    if options.tests and not rehearsal:
        # Without the options of pyproject.toml, whose plugins may not be there; one process has the card for itself.
        command = ["-m", "pytest", "-o", "addopts=", "-q", "-rs", "--tb=short", "-m", "gpu", "tests/test_gpu.py"]
        status, lines = shown(command)
        tests = next((line for line in reversed(lines) if re.search(r"\d (passed|failed|skipped|error)", line)), "none")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from modelstock.devices import device_kind

    device_kind(options.device)
    torch.set_num_threads(options.threads)
    threads = ["--threads", options.threads]
    small = ["--batch-size", 4, "--steps", 2, *threads]
    card = "none: a rehearsal on the CPU" if rehearsal else torch.cuda.get_device_name()
    sheet, product = (None if rehearsal else peak_of(card)), product_peak(options.device)
    rates = forward_rates(options.device, 4 if rehearsal else 500)
    rates += training_rates(options, small if rehearsal else ["--batch-size", 256, "--steps", 60, *threads])
    rates += scoring_rates(
        options,
        2 if rehearsal else 8,
        ["--images", 8, "--batch-size", 4] if rehearsal else ["--images", 1024, "--batch-size", 256],
    )
    cudnn = torch.backends.cudnn.version() if not rehearsal else "unused"
    known = "unknown card" if sheet is None else f"{sheet:g} TFLOP/s"
    print(f"\n| ViT-B/32 | {card} | TFLOP/s | of the data sheet | of the product |\n|---|---:|---:|---:|---:|")
    print(f"| driver | {driver()}, CUDA {torch.version.cuda}, cuDNN {cudnn} | | | |")
    print(f"| versions | {versions()} | | | |")
    print(f"| processor | {len(os.sched_getaffinity(0))} cores, {options.threads} threads | | | |")
    print(f"| tests marked gpu | {tests.strip('= ')} | | | |")
    print(f"| dense bfloat16 by the data sheet | {known} | {'' if sheet is None else f'{sheet:g}'} | | |")
    share = "" if sheet is None else f"{100 * product / sheet:.1f} %"
    print(f"| product of two matrices, 8192 a side | | {product:.3g} | {share} | |")
    for rate in rates:
        print(rate.row([sheet, product]))
    parts = {"training": "benchmarks/train.py", "scoring": "benchmarks/evaluate.py"}
    failed = [file for part, file in parts.items() if not any(rate.name.startswith(part) for rate in rates)]
    if failed:
        print(f"\nNo figures of {' and '.join(failed)}: see above.")
    return 1 if status or failed else 0


if __name__ == "__main__":
    sys.exit(main())
