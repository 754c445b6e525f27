"""Training the embedded benchmark's tower beside other processes that do the same, by how long waiting threads spin.

    python benchmarks/threads.py [--steps N] [--rounds N] [--threads N]

1, 2 and 4 processes train at once, each `steps` steps of a bare loop with `threads` threads; all spin as GNU's OpenMP
does by itself (300,000 rounds), as modelstock sets it, or not at all. The variants take turns, `rounds` times; a figure
is the median over rounds of the mean milliseconds per step, of all processes together.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

from modelstock import SPIN_COUNT

ROOT = Path(__file__).parent.parent
SPINS = {"by itself": "300000", "as modelstock sets it": SPIN_COUNT, "not at all": "0"}
PROCESSES = (1, 2, 4)

TRAIN = """
import sys, time, torch
from modelstock.models.towers import TINY_CLIP, Classifier, build_clip
steps, threads = map(int, sys.argv[1:])
torch.set_num_threads(threads)
torch.manual_seed(0)
model = Classifier(build_clip(TINY_CLIP).visual, 24, 128)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
images, labels = torch.randn(64, 3, 32, 32), torch.randint(0, 24, (64,))
for step in range(-3, steps):
    if step == 0:
        begun = time.perf_counter()
    loss = torch.nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
print(1000 * (time.perf_counter() - begun) / steps)
"""


def milliseconds(processes: int, spin: str, *, steps: int, threads: int) -> float:
    """Mean milliseconds per step of this many processes at once."""
    env = {**os.environ, "GOMP_SPINCOUNT": spin, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRAIN, str(steps), str(threads)]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
    return statistics.mean(float(process.communicate()[0]) for process in started)


def main() -> None:
    """Let the variants take turns and print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("steps", 20), ("rounds", 3), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {(name, count): [] for name in SPINS for count in PROCESSES}
    for _ in range(options.rounds):
        for name, count in found:
            took = milliseconds(count, SPINS[name], steps=options.steps, threads=options.threads)
            found[name, count].append(took)
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {options.threads} threads, Python {platform.python_version()}, "
        f"{options.steps} steps, medians of {options.rounds}\n"
    )
    print("| milliseconds per step; threads that wait spin | " + " | ".join(f"{n} at once" for n in PROCESSES) + " |")
    print("|---|" + "---:|" * len(PROCESSES))
    for name in SPINS:
        print(f"| {name} | " + " | ".join(f"{statistics.median(found[name, n]):.0f}" for n in PROCESSES) + " |")


if __name__ == "__main__":
    main()
