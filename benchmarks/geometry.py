"""The geometry of CLIPs on disk (ViT-L/14: 427.6M parameters, 1.7 GB each): wall time and peak memory, side by side.

    python benchmarks/geometry.py [--folder FOLDER] [--model NAME] [--count N] [--rounds N]

- floor: read the files, the anchor's and `count` others, in 16 MB pieces, and write nothing.
- modelstock geometry: the command, process start and figures included.
- the same with `--projections 0`, which from four seeds on leaves out the projections on random directions.

Files, turns, ratios and memory as in benchmarks/merge.py.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from merge import MAKE, ROOT, machine, take_turns

FLOOR = """
import sys
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        while file.read(1 << 24):
            pass
"""


def main() -> None:
    """Make the files, let the variants take turns, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go (5 GB for two ViT-L); default: a temporary one")
    parser.add_argument("--model", default="ViT-L-14", help="of open_clip")
    parser.add_argument("--count", type=int, default=2, help="fine-tuned checkpoints")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        names = [str(folder / f"{name}.safetensors") for name in ("anchor", *range(options.count))]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        make = [sys.executable, "-c", MAKE, "False", options.model, *names]
        made = subprocess.run(make, env=env, capture_output=True, text=True, check=True)
        command = [sys.executable, "-m", "modelstock.cli", "geometry", "--overwrite", "--anchor", *names, "--out"]
        commands = {
            f"floor: read {len(names)}": [sys.executable, "-c", FLOOR, *names],
            "modelstock geometry": [*command, str(folder / "geometry")],
            "modelstock geometry --projections 0": [*command, str(folder / "without"), "--projections", "0"],
        }
        print(f"{options.model}, {int(made.stdout):,} parameters, {machine()}, medians of {options.rounds}\n")
        take_turns(commands, env, options.rounds)


if __name__ == "__main__":
    main()
