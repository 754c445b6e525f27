"""What a work pool costs per stage: many stages that do nothing, on machines that are clones on this one.

    python benchmarks/cluster.py [--stages 200] [--machines 2] [--slots 4]

Prefect's server runs on PostgreSQL (Debian's package postgresql), the DVC remote is a folder. Of each stage, the time
that it keeps a slot is set against what its command takes, and what pulling its inputs and pushing its outputs take.
The same stages run once more by `dvc repro` in one clone. Exits with 1 if a stage was lost or ran twice.
"""

import argparse
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from flows.services import _ask
from tests.support.cluster import Cluster, Machine, prefect_server, toy
from tests.support.postgres import postgres

PIPELINE = """
stages:
  prepare: {{cmd: python work.py prepare prepare.txt, deps: [work.py, in.txt], outs: [prepare.txt]}}
  short:
    foreach: {names}
    do:
      cmd: python work.py ${{item}} outs/${{item}}
      deps: [work.py, prepare.txt]
      outs: ["outs/${{item}}"]
      meta: {{device: 1}}
"""
WORK = """
import os, sys, time
from pathlib import Path
begun = time.time()
name, out = sys.argv[1:]
Path(out).parent.mkdir(exist_ok=True)
Path(out).write_text(name)
with open(os.environ["MACHINE_LOG"], "a") as file:
    file.write(f"{name} {os.environ.get('MACHINE')} {begun} {time.time()}\\n")
"""


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def runs(api: str) -> list[dict]:
    """All flow runs of stages, with their states."""
    found: list[dict] = []
    while True:
        page = _ask(
            f"{api}/flow_runs/filter", {"flows": {"name": {"any_": ["stage"]}}, "limit": 100, "offset": len(found)}
        )
        found += page
        if len(page) < 100:
            return found


def slot_seconds(api: str, run: dict) -> float:
    """From when a worker took a run to its end."""
    states = {
        state["type"]: moment(state["timestamp"]) for state in _ask(f"{api}/flow_run_states/?flow_run_id={run['id']}")
    }
    return states["COMPLETED"] - states["PENDING"]


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} | {low:.1f} to {high:.1f} | {max(values):.1f}"


def main() -> int:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--machines", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4)
    options = parser.parse_args()
    names = [f"s{number:03d}" for number in range(options.stages)]
    with tempfile.TemporaryDirectory() as name, postgres() as database:
        folder = Path(name)
        (folder / "server").mkdir()
        url = database.database("prefect", "password").replace("postgresql://", "postgresql+asyncpg://")
        with prefect_server(folder / "server", PREFECT_API_DATABASE_CONNECTION_URL=url) as server:
            files = {**toy(str(folder / "cluster/remote")), "dvc.yaml": PIPELINE.format(names=names), "work.py": WORK}
            files[".gitignore"] = "/prepare.txt\n/outs\n"
            cluster = Cluster(folder / "cluster", files, {**server, "MODELSTOCK_LEASE_S": "120"})
            try:
                return measure(cluster, options, names)
            finally:
                cluster.close()


def measure(cluster: Cluster, options: argparse.Namespace, names: list[str]) -> int:
    """Run the stages on the pool and in one clone, and print what it took."""
    cluster.deploy()
    begun = time.monotonic()
    machines: list[Machine] = [cluster.machine(f"machine-{number}") for number in range(options.machines)]
    for machine in machines:
        machine.join("--slots", str(options.slots))
    joined = (time.monotonic() - begun) / options.machines
    begun = time.monotonic()
    done = cluster.reproduce()
    wall = time.monotonic() - begun
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr)
        return 1
    api = cluster.env["PREFECT_API_URL"]
    ran = [line.split() for line in cluster.events.read_text().splitlines() if line.startswith("s")]
    commands = {stage: float(end) - float(start) for stage, _, start, end in ran}
    of_stage = {run["name"].partition("@")[2]: run for run in runs(api)}
    overhead, transfers, outside = [], [], []
    for stage, run in of_stage.items():
        seconds = [float(text) for text in re.findall(r"in ([\d.]+) s", run["state"]["message"])]
        pulled, _, sent = seconds
        held = slot_seconds(api, run)
        transfers.append(pulled + sent)
        overhead.append(held - pulled - sent - commands[stage])
        outside.append(held - sum(seconds))
    counts = Counter(stage for stage, *_ in ran)
    wrong = [stage for stage in names if counts[stage] != 1]

    alone = cluster.machine("alone", MACHINE_LOG=str(cluster.folder / "other"))
    begun = time.monotonic()
    local = alone("dvc", "repro", "-q")
    seconds = time.monotonic() - begun
    assert local.returncode == 0, local.stderr
    same = (alone.folder / "dvc.lock").read_bytes() == (cluster.head.folder / "dvc.lock").read_bytes()

    slots = options.machines * options.slots
    print(
        f"{options.stages} stages on {slots} slots of {options.machines} machines, all of them this one's "
        f"{os.cpu_count()} cores; Python {platform.python_version()}, {platform.machine()}\n"
    )
    print(
        f"joining took {joined:.1f} s a machine; all stages {wall:.0f} s, {wall / options.stages:.2f} s a stage; "
        f"`dvc repro` in one clone {seconds:.0f} s, {seconds / options.stages:.2f} s a stage"
    )
    print(
        f"lost or doubled stages: {len(wrong)}; dvc.lock: {'the bytes' if same else 'NOT THE BYTES'} of `dvc repro`\n"
    )
    print("| seconds a stage, in its slot | median | quartiles | most |\n|---|---:|---:|---:|")
    print(f"| besides its command, the pull and the push | {quartiles(overhead)} |")
    print(f"| of these: Prefect, from taking the run to its end | {quartiles(outside)} |")
    print(f"| the pull and the push | {quartiles(transfers)} |")
    print(f"| its command | {quartiles(list(commands.values()))} |")
    return 1 if wrong or not same else 0


if __name__ == "__main__":
    sys.exit(main())
