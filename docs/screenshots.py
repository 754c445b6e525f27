"""Takes the pictures of pipeline.md: the MLflow and Prefect UIs after `make repro`, `make up` and a flow run.

    .venv/bin/python docs/screenshots.py [--mlflow URL] [--prefect URL] [--prefix cluster-]

With the prefix they are those of cluster.md: of a run over several machines, at a head without passwords.
Needs Chromium (Debian's package chromium) on the PATH. The pages belong to servers on 127.0.0.1; nothing else is asked.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from PIL import Image

from modelstock.tracking.mlflow import views

DOCS = Path(__file__).parent
FLOW = {"flows": {"name": {"any_": ["reproduce"]}}}
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")


def ask(url: str, body: dict[str, object]) -> object:
    """POST JSON, and the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def take(url: str, file: Path, *, size: str = "1400,900") -> None:
    """One page as PNG, once its scripts have had 15 seconds of their own time."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *QUIET]
        command += [f"--user-data-dir={profile}", f"--window-size={size}", "--virtual-time-budget=15000"]
        subprocess.run([*command, f"--screenshot={file}", url], check=True, capture_output=True, timeout=180)
    print(file)


def crop(file: Path, height: int) -> None:
    """Keep the upper part of a picture."""
    with Image.open(file) as picture:
        upper = picture.crop((0, 0, picture.width, height))
    upper.save(file)


def main() -> int:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlflow", default="http://127.0.0.1:5000")
    parser.add_argument("--prefect", default="http://127.0.0.1:4200")
    parser.add_argument("--prefix", default="", help="of the pictures' names")
    options = parser.parse_args()
    if shutil.which("chromium") is None:
        print("error: PATH: got no chromium; expected it, which takes the pictures; install the package chromium")
        return 1
    found = ask(f"{options.mlflow}/api/2.0/mlflow/experiments/search", {"max_results": 10})
    assert isinstance(found, dict)
    experiment = next(e["experiment_id"] for e in found["experiments"] if e["name"] == "modelstock")
    take(views.link(options.mlflow, experiment, views.MERGES), DOCS / f"{options.prefix}mlflow.png", size="1900,900")
    runs = ask(f"{options.prefect}/api/flow_runs/filter", {**FLOW, "sort": "START_TIME_DESC", "limit": 1})
    assert isinstance(runs, list)
    take(f"{options.prefect}/runs/flow-run/{runs[0]['id']}", DOCS / f"{options.prefix}prefect.png")
    if options.prefix:
        crop(DOCS / f"{options.prefix}prefect.png", 500)  # below are logs, with this machine's folders
    return 0


if __name__ == "__main__":
    sys.exit(main())
