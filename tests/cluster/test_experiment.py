"""The whole experiment, small, on a head and two machines, as docs/cluster.md has it: PostgreSQL below both servers,
passwords, a DVC remote by ssh, one machine that joins by hand and is killed, and one that Slurm starts.
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from base64 import b64encode
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.cluster import ROOT, Cluster, within
from tests.support.ports import free_port
from tests.support.postgres import postgres, programs
from tests.support.slurm import MISSING, missing, running_slurm
from tests.support.ssh import SSHD, ssh_server
from tests.test_kills import SMALL, update

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing(), reason=MISSING),
    pytest.mark.skipif(programs() is None, reason="needs Debian's package postgresql"),
    pytest.mark.skipif(SSHD is None, reason="needs Debian's package openssh-server"),
]
LONG = {"seeds": [0, 1], "periodic": {}, "longer": [], "anchors": {}, "variants": {}, "finetune": {"epochs": 8}}
PILOT = """
server: {server}
time: 10
slots: 1
idle_s: 60
clones: {clones}
"""


def files() -> dict[str, str]:
    """This project as git has it, with very small settings; a resume point after every step."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    wanted = ("flows/", "stages/", "modelstock/", "deploy/", "dvc.yaml", "prefect.yaml", ".dvcignore", ".gitignore")
    names = [name for name in listed.splitlines() if name.startswith(wanted) and (ROOT / name).is_file()]
    texts = {name: (ROOT / name).read_text() for name in names}
    text, count = re.subn(r"(?m)^SAVE_EVERY_S = [-\d.]+", "SAVE_EVERY_S = -1.0", texts["modelstock/training/resume.py"])
    assert count == 1
    texts["modelstock/training/resume.py"] = text
    yaml = YAML(typ="safe")
    params = yaml.load((ROOT / "params.yaml").read_text())
    for change in (SMALL, LONG):
        update(params, change)
    texts["params.yaml"] = json.dumps(params, indent=1)
    return {
        **texts,
        ".dvc/config": (ROOT / ".dvc/config").read_text(),
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    }


@pytest.fixture
def cluster(tmp_path):
    short = Path(tempfile.mkdtemp(prefix="slurm"))  # for a socket, whose path must be short
    with postgres() as database, ssh_server(tmp_path / "ssh") as ssh, running_slurm(short) as pilots:
        ports = {"MODELSTOCK_PREFECT_PORT": str(free_port()), "MODELSTOCK_MLFLOW_PORT": str(free_port())}
        mlflow = f"http://127.0.0.1:{ports['MODELSTOCK_MLFLOW_PORT']}"
        passwords = {
            "PREFECT_API_AUTH_STRING": "team:a long password",
            "MLFLOW_TRACKING_URI": mlflow,
            "MLFLOW_TRACKING_USERNAME": "team",
            "MLFLOW_TRACKING_PASSWORD": "another long password",
        }
        env = {
            "PREFECT_API_URL": f"http://127.0.0.1:{ports['MODELSTOCK_PREFECT_PORT']}/api",
            "MODELSTOCK_SCRATCH": str(tmp_path / "scratch"),
            "OMP_NUM_THREADS": "1",
            **passwords,
        }
        made = Cluster(tmp_path, files(), env)
        made.local = f"[core]\nremote = shared\n{ssh.remote(tmp_path / 'remote')}"
        made.pilots = pilots
        made.head.env |= {
            **ports,
            "MODELSTOCK_PREFECT_DB": database.database("prefect", "of prefect"),
            "MODELSTOCK_MLFLOW_DB": database.database("mlflow", "of mlflow"),
            "PREFECT_SERVER_API_AUTH_STRING": passwords["PREFECT_API_AUTH_STRING"],
            "MODELSTOCK_MLFLOW_USER": passwords["MLFLOW_TRACKING_USERNAME"],
            "MODELSTOCK_MLFLOW_PASSWORD": passwords["MLFLOW_TRACKING_PASSWORD"],
        }
        for machine in made.machines:
            (machine.folder / ".dvc/config.local").write_text(made.local)
        yield made
        made.head("flows.services", "down")
        made.close()
    shutil.rmtree(short)


def machine(cluster: Cluster, name: str):
    new = cluster.machine(name)
    (new.folder / ".dvc/config.local").write_text(cluster.local)
    return new


def request(method: str, url: str, user: str, body: dict | None = None) -> dict:
    """What a server answers to a user."""
    headers = {"content-type": "application/json", "authorization": f"Basic {b64encode(user.encode()).decode()}"}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=60) as answer:
        return json.loads(answer.read())


def locked(folder: Path) -> dict:
    return YAML(typ="safe").load((folder / "dvc.lock").read_text())["stages"]


def test_a_small_experiment_on_two_machines_one_of_them_killed_ends_with_the_bytes_of_one(cluster, tmp_path):
    head = cluster.head
    up = head("flows.services", "up", "--profile", "head")
    assert up.returncode == 0, up.stderr
    assert "python -m flows.worker join --server" in up.stdout
    assert "long password" not in up.stdout + up.stderr

    def ask(method: str, path: str, body: dict | None = None) -> dict:
        return request(method, f"{cluster.env['PREFECT_API_URL']}/{path}", head.env["PREFECT_API_AUTH_STRING"], body)

    begun = time.time()
    first, login = machine(cluster, "first"), machine(cluster, "login")
    first.join()
    print(f"joined in {time.time() - begun:.1f} s")
    run = ask(
        "POST",
        f"deployments/{ask('GET', 'deployments/name/reproduce/shapes')['id']}/create_flow_run",
        {"parameters": {"params": {"pool": "gpu"}}},
    )["id"]  # as from the form in the UI

    def log() -> str:
        return (head.folder / ".services/worker.log").read_text()

    def over() -> str:
        state = ask("GET", f"flow_runs/{run}")["state_type"]
        return state if state in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else ""

    def in_the_middle() -> bool:
        """Whether a seed that `first` trains has saved a resume point and is not done."""
        running = re.search(r"stage finetune@(\d): running, first", first.status())
        return bool(running) and any((tmp_path / "scratch").glob("finetune*/*/state.pt"))

    assert within(300, in_the_middle), log()[-3000:]
    first.kill()
    killed = time.time()
    settings = tmp_path / "pilot.yaml"
    settings.write_text(PILOT.format(server=cluster.env["PREFECT_API_URL"], clones=tmp_path / "pilots"))
    login.env |= cluster.pilots.env | {k: v for k, v in login.env.items() if k not in ("PATH",)}
    submitted = login("flows.slurm", "submit", "--config", str(settings))
    assert submitted.returncode == 0, submitted.stderr
    assert within(90, lambda: "no sign of life" in log()), log()[-2000:]
    print(f"missed {time.time() - killed:.1f} s after the kill")
    assert within(600, over) == "COMPLETED", log()[-5000:]
    print(f"the flow took {time.time() - begun:.0f} s")
    assert "it is queued again" in log()

    # One machine, which has no remote, and no server, and knows nothing of the others.
    alone = cluster.machine("alone")
    for name in list(alone.env):
        if name.startswith(("MLFLOW", "PREFECT_API", "MODELSTOCK")):
            del alone.env[name]
    done = alone("flows.dvc_repro")
    assert done.returncode == 0, done.stderr[-3000:]
    assert locked(head.folder) == locked(alone.folder)
    assert (head.folder / "dvc.lock").read_bytes() == (alone.folder / "dvc.lock").read_bytes()
    for folder in ("models", "results", "reports", "metrics"):
        expected = {
            f.relative_to(alone.folder): f.read_bytes() for f in (alone.folder / folder).rglob("*") if f.is_file()
        }
        got = {f.relative_to(head.folder): f.read_bytes() for f in (head.folder / folder).rglob("*") if f.is_file()}
        assert got == expected

    # What has been run is on the head's MLflow server.
    user = f"{head.env['MLFLOW_TRACKING_USERNAME']}:{head.env['MLFLOW_TRACKING_PASSWORD']}"
    mlflow = f"{cluster.env['MLFLOW_TRACKING_URI']}/api/2.0/mlflow"
    found = request("POST", f"{mlflow}/experiments/search", user, {"max_results": 10})["experiments"]
    ids = [experiment["experiment_id"] for experiment in found]
    runs = request("POST", f"{mlflow}/runs/search", user, {"experiment_ids": ids, "max_results": 1000})["runs"]
    names = {run["info"]["run_name"] for run in runs}
    assert {"seed-0", "seed-1"} <= names
    assert any(name.startswith("model_stock") for name in names)
