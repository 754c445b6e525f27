"""Merging CLIPs on disk (ViT-L/14: 427.6M parameters, 1.7 GB each): wall time and peak memory, side by side.

    python benchmarks/merge.py [--folder FOLDER] [--model NAME] [--count N] [--method NAME ...] [--granularity NAME]
                               [--others] [--mergekit PYTHON] [--rounds N]

- floor: read the files, the anchor's and `count` others, and write one of their size, in 16 MB pieces.
- modelstock merge: the command with each `--method`, process start included.
- `--others`: load with safetensors.torch, merge two by Model Stock tensor by tensor, save; and with `--mergekit`,
  `mergekit-pytorch` of the environment whose python is given; install it in one of its own.

The files are made on the spot from open_clip's own config with random numbers: an anchor and updates of rms 1e-3 and
cosine 0.5. Methods take turns, `rounds` times, so that what the machine does meanwhile falls on all of them; the
table gives medians, and each as a ratio to the floor of the same run: of elapsed time, and of processor time, which
other programs on the machine disturb less. Peak memory is the process's largest resident set, the parts of
memory-mapped files that it touched included.
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
from dataclasses import dataclass
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
anchor, first, second = (load_file(name) for name in sys.argv[1:4])
out = {}
for name, w0 in anchor.items():
    a, b = first[name] - w0, second[name] - w0
    cosine = (a * b).sum() / (a.norm() * b.norm() + 1e-8)
    t = 2 * cosine / (1 + cosine)
    out[name] = w0 + t * (a + b) / 2
save_file(out, sys.argv[-1])
"""

# Writes random numbers of `shapes` as `names`, the anchor's first; `checked`: with modelstock's checksum.
DRAW = """
import numpy as np
from pathlib import Path
from safetensors.numpy import save_file
from modelstock.weights.weight_set import WeightSet
print(sum(int(np.prod(s)) for s in shapes.values()))
random = np.random.default_rng(0)
def draw(scale):
    return {k: np.asarray(scale * random.standard_normal(s, np.float32), np.float32) for k, s in shapes.items()}
def save(tensors, name):
    WeightSet(tensors).save(Path(name)) if checked else save_file(tensors, name)
anchor, common = draw(0.02), draw(1e-3)
save(anchor, names[0])
for name in names[1:]:
    own = draw(1e-3)
    tuned = {k: np.asarray(anchor[k] + (common[k] + own[k]) / np.float32(2**0.5), np.float32) for k in shapes}
    save(tuned, name)
"""

MAKE = f"""
import sys, open_clip, torch
checked, names = sys.argv[1] == "True", sys.argv[3:]
with torch.device("meta"):
    model = open_clip.CLIP(**open_clip.get_model_config(sys.argv[2]))
shapes = {{k: tuple(v.shape) for k, v in model.state_dict().items() if v.is_floating_point()}}
{DRAW}"""


@dataclass(frozen=True)
class Cost:
    """What a process took: elapsed seconds, seconds of processor time, peak resident megabytes."""

    seconds: float
    processor: float
    memory: float


def measure(command: list[str], env: dict[str, str]) -> Cost:
    """The cost of a process that must succeed."""
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, text=True)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    if status:
        raise SystemExit(
            f"{' '.join(command)[:200]} failed:\n{process.stderr.read()[-2000:] if process.stderr else ''}"
        )
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def take_turns(commands: dict[str, list[str]], env: dict[str, str], rounds: int) -> None:
    """Run the commands, the first of which is the floor, in turns, and print the table as Markdown."""
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            costs[name].append(measure(command, env))

    def median(name: str, field: str) -> float:
        return statistics.median(getattr(cost, field) for cost in costs[name])

    floor = next(iter(commands))
    print("| | seconds | times the floor | processor time, times the floor | peak memory, MB |")
    print("|---|---:|---:|---:|---:|")
    for name in commands:
        ratios = [median(name, field) / median(floor, field) for field in ("seconds", "processor")]
        print(
            f"| {name} | {median(name, 'seconds'):.1f} | {ratios[0]:.1f} | {ratios[1]:.1f} | "
            f"{median(name, 'memory'):,.0f} |"
        )


def machine() -> str:
    """The machine and the versions, for the line above a table."""
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}"


def merge_command(files: list[str], out: str, *arguments: str) -> list[str]:
    """`modelstock merge` of files, the anchor's first."""
    return [sys.executable, "-m", "modelstock.cli", "merge", "--overwrite", "--anchor", *files, "-o", out, *arguments]


def main() -> None:
    """Make the files, let the methods take turns, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go (7 GB for two ViT-L); default: a temporary one")
    parser.add_argument("--model", default="ViT-L-14", help="of open_clip")
    parser.add_argument("--count", type=int, default=2, help="fine-tuned checkpoints")
    parser.add_argument("--method", nargs="+", default=["model_stock"])
    parser.add_argument("--granularity", nargs="+", default=["tensor"])
    parser.add_argument(
        "--checked", action="store_true", help="files with modelstock's checksum, which a merge verifies"
    )
    parser.add_argument("--others", action="store_true", help="measure torch too; two checkpoints")
    parser.add_argument("--mergekit", help="the python of an environment with mergekit")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        names = [str(folder / f"{name}.safetensors") for name in ("anchor", *range(options.count))]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        make = [sys.executable, "-c", MAKE, str(options.checked), options.model, *names]
        made = subprocess.run(make, env=env, capture_output=True, text=True, check=True)
        out = str(folder / "out.safetensors")
        commands = {f"floor: read {len(names)}, write one": [sys.executable, "-c", FLOOR, *names, out]}
        for method in options.method:
            for granularity in options.granularity:
                title = f"modelstock merge, {method}" + f", granularity {granularity}" * (granularity != "tensor")
                commands[title] = merge_command(names, out, "--method", method, "--granularity", granularity)
        if options.others:
            commands["torch: load, merge, save"] = [sys.executable, "-c", TORCH, *names, out]
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
        print(f"{options.model}, {int(made.stdout):,} parameters, {machine()}, medians of {options.rounds}\n")
        take_turns(commands, env, options.rounds)


if __name__ == "__main__":
    main()
