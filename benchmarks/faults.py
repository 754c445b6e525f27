"""What keeping memory saves: processor time and page faults of a ViT-B/32's forward pass on a batch of 64.

    python benchmarks/faults.py [--towers N] [--used N] [--threads N]

Of `towers` towers with random weights, all are in memory together, as when many weight sets are scored in one pass, or
one at a time; and memory is kept between layers (modelstock.scoring.memory), or not. `used` of them do a forward pass,
after one by another tower that is not measured. Each of the four cases is a process of its own, for what malloc does
depends on all that came before.
"""

import argparse
import resource
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import torch
from evaluate import weight_sets
from vit import CONFIG, PREPROCESS

from modelstock.models.towers import build_classifier
from modelstock.scoring.memory import memory_kept

CASES = {
    "one tower at a time": (False, False),
    "all towers in memory": (True, False),
    "all towers in memory, memory kept": (True, True),
    "one tower at a time, memory kept": (False, True),
}


def used() -> np.ndarray:
    """Seconds of processor time in the program and in the system, and page faults, so far."""
    so_far = resource.getrusage(resource.RUSAGE_SELF)
    return np.array([so_far.ru_utime, so_far.ru_stime, so_far.ru_minflt])


@torch.inference_mode()
def measure(case: str, options: argparse.Namespace) -> str:
    """One row of the table."""
    together, kept = CASES[case]
    torch.set_num_threads(options.threads)
    sets = weight_sets(CONFIG, PREPROCESS, options.towers)
    images, cost = torch.randn(64, 3, 224, 224), np.zeros(3)
    with memory_kept("cpu") if kept else nullcontext():
        build_classifier(sets[0])(images)
        towers = [build_classifier(weights) for weights in sets] if together else []
        for number in range(options.used):
            tower = towers[number] if together else build_classifier(sets[number])
            begun = used()
            tower(images)
            cost += used() - begun
            del tower
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    user, system, faults = cost / options.used
    return f"| {case} | {user:.2f} | {system:.2f} | {faults:,.0f} | {peak:.1f} |"


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("towers", 20), ("used", 3), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--case", choices=CASES, help="this one, in this process")
    options = parser.parse_args()
    if options.case:
        print(measure(options.case, options))
        return
    print(f"{options.towers} towers, per forward pass of {options.used}, {options.threads} threads\n")
    print("| | user, s | system, s | page faults | peak memory, GB |\n|---|---:|---:|---:|---:|", flush=True)
    for case in CASES:
        subprocess.run([sys.executable, *sys.argv, "--case", case], check=True)


if __name__ == "__main__":
    main()
