"""Merging a pool of 72 checkpoints on disk, as that of Model Soups: time and peak memory beside a floor.

    python benchmarks/pool.py [--folder FOLDER] [--count N] [--blocks N] [--rounds N]

- floor: read the files once, the anchor's and `count` others, and write one, in 16 MB pieces.
- uniform, model_stock: `modelstock merge`, process start included.
- greedy: `merge_files` with a score that reads every tensor of a trial once, and that each further member improves: so
  all of them are taken, `count` are scored alone and `count` - 1 as candidates, and what it takes is merging.

The files have the tensors of open_clip's ViT-B/32 image tower with `blocks` of its 12 blocks (one: 9.9M parameters,
40 MB; twelve: 88M, 350 MB, 26 GB for all of them), and random numbers: an anchor and updates of rms 1e-3 and cosine
0.5. Turns, ratios and memory as in benchmarks/merge.py.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from merge import DRAW, FLOOR, ROOT, machine, merge_command, take_turns

MAKE = f"""
import sys, open_clip, torch
checked, blocks, names = True, int(sys.argv[1]), sys.argv[2:]
with torch.device("meta"):
    model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32"))
state = {{k: tuple(v.shape) for k, v in model.visual.state_dict().items()}}
number = lambda name: int(name.split("resblocks.")[1].split(".")[0])
shapes = {{k: s for k, s in state.items() if "resblocks" not in k or number(k) < blocks}}
{DRAW}"""

GREEDY = """
import sys
from pathlib import Path
from modelstock.merging.files import merge_files
anchor, *tuned, out = map(Path, sys.argv[1:])
taken = []
def score(trials):
    for trial in trials:
        for tensor in trial.tensors.values():
            tensor[..., :1].sum()
        taken.append(len(taken))
    return taken[-len(trials):]
merge_files("greedy", anchor, tuned, out, score=score, overwrite=True)
"""


def main() -> None:
    """Make the files, let the methods take turns, print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files go (3 GB for one block); default: a temporary one")
    parser.add_argument("--count", type=int, default=72)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        names = [str(folder / f"{name}.safetensors") for name in ("anchor", *range(options.count))]
        env, out = {**os.environ, "PYTHONPATH": str(ROOT)}, str(folder / "out.safetensors")
        make = [sys.executable, "-c", MAKE, str(options.blocks), *names]
        made = subprocess.run(make, env=env, capture_output=True, text=True, check=True)
        commands = {
            f"floor: read {len(names)}, write one": [sys.executable, "-c", FLOOR, *names, out],
            "modelstock merge, uniform": merge_command(names, out, "--method", "uniform"),
            "modelstock merge, model_stock": merge_command(names, out),
            "greedy, all taken": [sys.executable, "-c", GREEDY, *names, out],
        }
        size = f"{int(made.stdout):,} parameters, {os.path.getsize(names[0]) / 1e6:.0f} MB each"
        print(f"{options.count} checkpoints, {size}, {machine()}, medians of {options.rounds}\n")
        take_turns(commands, env, options.rounds)


if __name__ == "__main__":
    main()
