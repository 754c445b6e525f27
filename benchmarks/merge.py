"""Merging three ViT-L/14 CLIPs on disk (427.6M parameters, 1.7 GB each): wall time and peak memory, side by side.

    python benchmarks/merge.py [--folder FOLDER] [--mergekit PYTHON] [--rounds N]

- floor: read the three files and write one of their size, in 16 MB pieces.
- ours: `modelstock merge --method model_stock`, process start included.
- torch: load the three with safetensors.torch, merge tensor by tensor, save.
- mergekit: `mergekit-pytorch` of the environment whose python is given; install it in one of its own.

The files are made on the spot from open_clip's own config with random numbers: an anchor and two updates of rms 1e-3
and cosine 0.5. Methods take turns, `rounds` times, so that what the machine does meanwhile falls on all of them; the
table gives medians, and each as a ratio to the floor of the same run. Peak memory is the process's largest resident
set, the parts of memory-mapped files that it touched included.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

FLOOR = """
import os, sys
piece = 1 << 24
out = open(sys.argv[-1], "wb")
for number, name in enumerate(sys.argv[1:-1]):
    with open(name, "rb") as file:
        while data := file.read(piece):
            if number == 0:
                out.write(data)
out.flush()
os.fsync(out.fileno())
"""

TORCH = """
import sys, torch
from safetensors.torch import load_file, save_file
anchor, first, second = (load_file(name) for name in sys.argv[1:-1])
out = {}
for name, w0 in anchor.items():
    a, b = first[name] - w0, second[name] - w0
    cosine = (a * b).sum() / (a.norm() * b.norm() + 1e-8)
    t = 2 * cosine / (1 + cosine)
    out[name] = w0 + t * (a + b) / 2
save_file(out, sys.argv[-1])
"""

MAKE = """
import sys, numpy as np, open_clip, torch
from pathlib import Path
from modelstock.weights.weight_set import WeightSet
with torch.device("meta"):
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-L-14"))
shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}
print(sum(int(np.prod(s)) for s in shapes.values()))
random = np.random.default_rng(0)
def draw(scale):
    return {k: np.asarray(scale * random.standard_normal(s, np.float32), np.float32) for k, s in shapes.items()}
anchor, common = draw(0.02), draw(1e-3)
WeightSet(anchor).save(Path(sys.argv[1]))
for name in sys.argv[2:]:
    own = draw(1e-3)
    tuned = {k: np.asarray(anchor[k] + (common[k] + own[k]) / np.float32(2**0.5), np.float32) for k in shapes}
    WeightSet(tuned).save(Path(name))
"""


def measure(command: list[str], env: dict[str, str]) -> tuple[float, float]:
    """Wall seconds and peak resident megabytes of a process that must succeed."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(
            f"{' '.join(command)[:200]} failed:\n{process.stderr.read()[-2000:] if process.stderr else ''}"
        )
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    """Make the files, let the methods take turns, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go (7 GB); default: a temporary folder")
    parser.add_argument("--mergekit", help="the python of an environment with mergekit")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        names = [str(folder / f"{name}.safetensors") for name in ("anchor", "first", "second")]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        made = subprocess.run([sys.executable, "-c", MAKE, *names], env=env, capture_output=True, text=True, check=True)
        out = str(folder / "out.safetensors")
        commands = {
            "floor: read three, write one": [sys.executable, "-c", FLOOR, *names, out],
            "modelstock merge": [
                sys.executable,
                "-m",
                "modelstock.cli",
                "merge",
                "--overwrite",
                "--anchor",
                *names,
                "-o",
                out,
            ],
            "torch: load, merge, save": [sys.executable, "-c", TORCH, *names, out],
        }
        if options.mergekit:
            config = folder / "config.yml"
            config.write_text(
                json.dumps(
                    {
                        "merge_method": "model_stock",
                        "base_model": names[0],
                        "dtype": "float32",
                        "models": [{"model": name} for name in names[1:]],
                    }
                )
            )
            script = Path(options.mergekit).parent / "mergekit-pytorch"
            commands["mergekit-pytorch"] = [str(script), str(config), str(folder / "mergekit")]
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                found[name].append(measure(command, env))
        floor = statistics.median(seconds for seconds, _ in next(iter(found.values())))
        print(
            f"{int(made.stdout):,} parameters, {os.cpu_count()} cores ({platform.machine()}), Python "
            f"{platform.python_version()}, medians of {options.rounds}\n"
        )
        print("| | seconds | times the floor | peak memory, MB |\n|---|---:|---:|---:|")
        for name, rounds in found.items():
            seconds, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
            print(f"| {name} | {seconds:.1f} | {seconds / floor:.1f} | {memory:,.0f} |")


if __name__ == "__main__":
    main()
