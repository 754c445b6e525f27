"""How long the command takes to start: medians over rounds of whole processes, in turns.

    python benchmarks/start.py [--rounds N]

`floor` is an interpreter that imports numpy and ends, which every merge needs.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "floor: python -c 'import numpy'": ["-c", "import numpy"],
    "modelstock --help": ["-m", "modelstock.cli", "--help"],
    "modelstock methods": ["-m", "modelstock.cli", "methods"],
    "modelstock merge --help": ["-m", "modelstock.cli", "merge", "--help"],
}


def main() -> None:
    """Time the commands, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, words in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    floor = statistics.median(next(iter(seconds.values())))
    print(f"Python {platform.python_version()}, {platform.machine()}, medians of {rounds} rounds\n")
    print("| | seconds | times the floor |\n|---|---:|---:|")
    for name, values in seconds.items():
        print(f"| {name} | {statistics.median(values):.2f} | {statistics.median(values) / floor:.1f} |")


if __name__ == "__main__":
    main()
