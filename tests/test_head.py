"""The head machine's services: `python -m flows.services up --profile head`, and what it refuses before it starts any.

Tests marked `cluster` have a PostgreSQL server of their own: `make test-cluster`.
"""

import base64
import importlib.util
import json
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.head import Head, HeadError, _database, check, head_settings, hide, is_loopback
from flows.services import _ask
from tests.support.ports import free_port
from tests.support.postgres import postgres
from tests.support.services import running, within

ROOT = Path(__file__).parent.parent
DATABASES = {
    "MODELSTOCK_PREFECT_DB": "postgresql://prefect:sesame@127.0.0.1:1/prefect",
    "MODELSTOCK_MLFLOW_DB": "postgresql://mlflow:sesame@127.0.0.1:1/mlflow",
}
PREFECT = {"PREFECT_SERVER_API_AUTH_STRING": "ann:sesame"}
MLFLOW = {"MODELSTOCK_MLFLOW_USER": "ann", "MODELSTOCK_MLFLOW_PASSWORD": "open sesame twice"}
OPEN = {"MODELSTOCK_HOST": "0.0.0.0"}
OURS = ("MODELSTOCK_", "PREFECT_", "MLFLOW_")


@pytest.fixture
def settings(monkeypatch):
    """The settings of an environment that has these variables and no others of ours."""
    for name in [name for name in os.environ if name.startswith(OURS)]:
        monkeypatch.delenv(name)

    def of(**env: str) -> Head:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return head_settings(4200, 5000)

    return of


# ------------------------------------------------------------ refused, and no server is needed to see why

FORM = "postgresql:// and user:password@host:port/database"
REFUSED = {
    "no database of Prefect": (
        {"MODELSTOCK_PREFECT_DB": ""},
        f"MODELSTOCK_PREFECT_DB: got nothing; expected the database of Prefect, {FORM}; "
        "set MODELSTOCK_PREFECT_DB: docs/cluster.md says how to create it",
    ),
    "no database of MLflow": (
        {"MODELSTOCK_MLFLOW_DB": ""},
        f"MODELSTOCK_MLFLOW_DB: got nothing; expected the database of MLflow, {FORM}; "
        "set MODELSTOCK_MLFLOW_DB: docs/cluster.md says how to create it",
    ),
    "another kind of database": (
        {"MODELSTOCK_MLFLOW_DB": "mysql://mlflow:sesame@127.0.0.1/mlflow"},
        f"MODELSTOCK_MLFLOW_DB: got a URL of mysql; expected the database of MLflow, {FORM}; "
        "set MODELSTOCK_MLFLOW_DB: docs/cluster.md says how to create it",
    ),
    "no URL": (
        {"MODELSTOCK_PREFECT_DB": "sesame@127.0.0.1/prefect"},
        f"MODELSTOCK_PREFECT_DB: got no URL; expected the database of Prefect, {FORM}; "
        "set MODELSTOCK_PREFECT_DB: docs/cluster.md says how to create it",
    ),
    "a password that ends the user's part": (
        {"MODELSTOCK_PREFECT_DB": "postgresql://prefect:12/sesame@127.0.0.1/prefect"},
        f"MODELSTOCK_PREFECT_DB: got a URL whose parts cannot be told from each other; expected {FORM}; "
        "write % as %25, @ as %40, : as %3A, / as %2F, ? as %3F and # as %23 in its parts",
    ),
    "an option that Prefect's library does not have": (
        {"MODELSTOCK_PREFECT_DB": DATABASES["MODELSTOCK_PREFECT_DB"] + "?sslmode=require&passfile=/sesame"},
        "MODELSTOCK_PREFECT_DB: got the option passfile; expected sslmode, host and port as options, which Prefect's "
        "library takes too; leave it out",
    ),
    "others reach it, and there are no passwords": (
        OPEN,
        "MODELSTOCK_HOST=0.0.0.0: got no authentication on Prefect and MLflow; expected "
        "authentication on both servers, "
        "as other machines reach this address; set PREFECT_SERVER_API_AUTH_STRING and MODELSTOCK_MLFLOW_USER and "
        "MODELSTOCK_MLFLOW_PASSWORD, or leave MODELSTOCK_HOST at 127.0.0.1: docs/cluster.md",
    ),
    "others reach it, and MLflow has no password": (
        {**OPEN, **PREFECT},
        "MODELSTOCK_HOST=0.0.0.0: got no authentication on MLflow; expected authentication on both servers, "
        "as other machines reach this address; set MODELSTOCK_MLFLOW_USER and MODELSTOCK_MLFLOW_PASSWORD, "
        "or leave MODELSTOCK_HOST at 127.0.0.1: docs/cluster.md",
    ),
    "others reach it, and Prefect has no password": (
        {"MODELSTOCK_HOST": "192.0.2.7", **MLFLOW},
        "MODELSTOCK_HOST=192.0.2.7: got no authentication on Prefect; expected authentication on both servers, "
        "as other machines reach this address; set PREFECT_SERVER_API_AUTH_STRING, "
        "or leave MODELSTOCK_HOST at 127.0.0.1: docs/cluster.md",
    ),
    "no password beside a user": (
        {"MODELSTOCK_MLFLOW_USER": "ann"},
        "MODELSTOCK_MLFLOW_PASSWORD: got nothing; expected it beside MODELSTOCK_MLFLOW_USER; "
        "set it, or unset MODELSTOCK_MLFLOW_USER",
    ),
    "no user beside a password": (
        {"MODELSTOCK_MLFLOW_PASSWORD": "open sesame twice"},
        "MODELSTOCK_MLFLOW_USER: got nothing; expected it beside MODELSTOCK_MLFLOW_PASSWORD; "
        "set it, or unset MODELSTOCK_MLFLOW_PASSWORD",
    ),
    "a password that MLflow finds too short": (
        {"MODELSTOCK_MLFLOW_USER": "ann", "MODELSTOCK_MLFLOW_PASSWORD": "open sesame"},
        "MODELSTOCK_MLFLOW_USER and MODELSTOCK_MLFLOW_PASSWORD: got 11 characters; expected a name "
        "without a colon and a password of 12 characters or more; choose others",
    ),
    "a user's name that ends at a colon": (
        {"MODELSTOCK_MLFLOW_USER": "a:b", "MODELSTOCK_MLFLOW_PASSWORD": "open sesame twice"},
        "MODELSTOCK_MLFLOW_USER and MODELSTOCK_MLFLOW_PASSWORD: got a colon in the user's name; "
        "expected a name without a colon and a password of 12 characters or more; choose others",
    ),
    "Prefect's password without a user": (
        {"PREFECT_SERVER_API_AUTH_STRING": "sesame"},
        "PREFECT_SERVER_API_AUTH_STRING: got no user, or no password; expected user:password; see docs/cluster.md",
    ),
    "artifacts elsewhere": (
        {"MODELSTOCK_MLFLOW_ARTIFACTS": "s3://key:sesame@bucket"},
        "MODELSTOCK_MLFLOW_ARTIFACTS: got a URL of s3; expected a folder of this machine; "
        "name one, or unset it: mlartifacts",
    ),
    "another MLflow": (
        {"MLFLOW_TRACKING_URI": "http://ann:sesame@elsewhere:5000"},
        "MLFLOW_TRACKING_URI: got http://***@elsewhere:5000; expected nothing, or the server that the head starts: "
        "http://127.0.0.1:5000; unset it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_are_refused_in_one_line_without_their_passwords(settings, case):
    env, line = REFUSED[case]
    with pytest.raises(HeadError) as refused:
        settings(**{**DATABASES, **env})
    assert str(refused.value) == line
    assert "sesame" not in str(refused.value)


def test_a_name_that_nobody_knows_is_refused(settings):
    with pytest.raises(
        HeadError, match=r"^MODELSTOCK_HOST: got 'nowhere.invalid': .*; expected an address or a name of "
    ):
        settings(**DATABASES, MODELSTOCK_HOST="nowhere.invalid")


@pytest.mark.parametrize(("library", "env"), [("psycopg2", {}), ("flask_wtf", MLFLOW)])
def test_a_missing_library_is_refused_with_the_extra_that_brings_it(settings, monkeypatch, library, env):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == library else find(name, *rest))
    with pytest.raises(HeadError) as refused:
        settings(**DATABASES, **env)
    assert str(refused.value) == (
        f"--profile head: got no library {library}; expected the extra cluster; "
        "make setup, or pip install 'modelstock[cluster]'"
    )


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Writes the DVC settings of a project in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".dvc").mkdir()

    def write(*lines: str) -> Path:
        (tmp_path / ".dvc/config").write_text("\n".join(["[core]", "no_scm = true", "analytics = false", *lines, ""]))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("lines", "got"),
    [
        ([], "no default remote"),
        (["['remote \"shared\"']", "url = /shared"], "no default remote"),
        (["remote = shared"], "a default remote 'shared' that is not defined"),
    ],
)
def test_without_a_remote_by_which_machines_exchange_results_it_is_refused(settings, project, lines, got):
    project(*lines)
    with pytest.raises(HeadError) as refused:
        check(settings(**DATABASES))
    assert str(refused.value) == (
        f"DVC: got {got}; expected one by which machines exchange results; dvc remote add -d NAME URL: docs/cluster.md"
    )


REMOTE = ["remote = shared", "['remote \"shared\"']", "url = /shared"]


def test_a_database_that_does_not_answer_is_refused(settings, project):
    project(*REMOTE)
    port = free_port()
    databases = {name: url.replace(":1/", f":{port}/") for name, url in DATABASES.items()}
    with pytest.raises(HeadError) as refused:
        check(settings(**databases))
    assert str(refused.value).startswith(
        f'MODELSTOCK_PREFECT_DB: got connection to server at "127.0.0.1", port {port} failed: Connection refused'
    )
    assert str(refused.value).endswith(
        "; expected a database that answers and takes the user; "
        "correct MODELSTOCK_PREFECT_DB, or create the database: docs/cluster.md"
    )
    assert "sesame" not in str(refused.value)


def test_the_command_says_one_line_and_starts_nothing(project):
    folder = project()
    env = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    for options, line in (
        (["--profile", "head"], f"error: {REFUSED['no database of Prefect'][1]}\n"),
        (
            ["--profile", "head", "--pool", "modelstock"],
            "error: --pool: got modelstock, the pool of the head itself; expected a pool that GPU machines join; "
            "choose another name, as gpu\n",
        ),
    ):
        command = [sys.executable, "-m", "flows.services", "up", *options]
        done = subprocess.run(command, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (1, "", line)
    assert sorted(path.name for path in folder.iterdir()) == [".dvc"]


# ------------------------------------------------------------ what the settings mean


@pytest.mark.parametrize(
    ("host", "only_this_machine"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("localhost", True), ("0.0.0.0", False), ("192.0.2.7", False)],
)
def test_which_addresses_only_this_machine_reaches(host, only_this_machine):
    assert is_loopback(host) == only_this_machine


def test_settings_show_no_password_and_leave_none_in_the_environment(settings):
    head = settings(**DATABASES, **PREFECT, **MLFLOW)
    assert "sesame" not in repr(head)
    hide()
    assert not [name for name, value in os.environ.items() if "sesame" in value]


def test_flows_find_the_servers_and_their_passwords_and_no_database(settings, tmp_path):
    env = settings(**DATABASES, **PREFECT, **MLFLOW).clients(tmp_path, Path(".services"))
    assert env == {
        "PREFECT_HOME": str(tmp_path / ".services/prefect"),
        "PREFECT_API_URL": "http://127.0.0.1:4200/api",
        "PREFECT_API_AUTH_STRING": "ann:sesame",
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:5000",
        "MLFLOW_TRACKING_USERNAME": "ann",
        "MLFLOW_TRACKING_PASSWORD": "open sesame twice",
        "MODELSTOCK_MLFLOW_URL": "http://127.0.0.1:5000",
    }


def test_a_machine_joins_by_the_address_that_others_reach_with_variables_that_are_named_only(settings):
    open_to_all = settings(**DATABASES, **PREFECT, **MLFLOW, **OPEN)
    name = socket.gethostname()
    assert open_to_all.joining("gpu") == [
        f"A GPU machine joins with: python -m flows.worker join --server http://{name}:4200/api --pool gpu",
        f"  and finds in its environment: MLFLOW_TRACKING_URI=http://{name}:5000, PREFECT_API_AUTH_STRING, "
        "MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD",
    ]


def test_the_file_for_a_shell_gives_it_every_password_as_it_is(settings, tmp_path):
    passwords = {
        "PREFECT_SERVER_API_AUTH_STRING": "ann:a 'b' $HOME `id`",
        "MODELSTOCK_MLFLOW_PASSWORD": "x\"$(id)\\ '#y",
    }
    head = settings(**DATABASES, **{**MLFLOW, **passwords})
    file = head.write_environment(tmp_path, Path())
    words = ["PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"]
    shell = f". ./{file}; \"{sys.executable}\" -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    env = json.loads(
        subprocess.run(["sh", "-c", shell], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    )
    assert [env[word] for word in words] == list(passwords.values())
    assert oct((tmp_path / file).stat().st_mode)[-3:] == "600"


# ------------------------------------------------------------ real servers on PostgreSQL

HEAD = ("--profile", "head")
HARD = "p@ss/w%rd'#? :x$"  # every character that ends a part of a URL, or means something in a file of settings
USER, PASSWORD = "ann", "ml flow%$'\"xyz"
AUTH = "ann:pre:fect $'\""


@pytest.fixture(scope="module")
def database():
    with postgres() as server:
        yield server


@contextmanager
def a_head(folder, database, name, password=PASSWORD):
    """Services of profile head in a new project, with databases of their own."""
    with running(folder) as services:
        (folder / ".dvc/config").write_text("\n".join(["[core]", "no_scm = true", "analytics = false", *REMOTE, ""]))
        (folder / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
        services.env |= {
            "MODELSTOCK_PREFECT_DB": database.database(f"prefect_{name}", HARD),
            "MODELSTOCK_MLFLOW_DB": database.database(f"mlflow_{name}", HARD),
            "PREFECT_SERVER_API_AUTH_STRING": AUTH,
            "MODELSTOCK_MLFLOW_USER": USER,
            "MODELSTOCK_MLFLOW_PASSWORD": password,
        }
        yield services


@pytest.fixture(scope="module")
def started(tmp_path_factory, database):
    folder = tmp_path_factory.mktemp("head")
    with a_head(folder, database, "shared") as services:
        services.up(*HEAD)
        yield services


@pytest.fixture
def head(started, monkeypatch):
    """The services, running, and the working directory theirs: `_ask` finds Prefect's password there."""
    monkeypatch.chdir(started.folder)
    return started


def status_of(url, user_and_password=None, data=None, **headers):
    """The HTTP status of an answer."""
    if user_and_password:
        headers["authorization"] = f"Basic {base64.b64encode(user_and_password.encode()).decode()}"
    try:
        request = urllib.request.Request(url, data, headers={"content-type": "application/json", **headers})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def pids(services):
    files = (services.folder / ".services").glob("*.json")
    return {file.stem: json.loads(file.read_text())["pid"] for file in files}


@pytest.mark.cluster
def test_both_servers_keep_all_in_their_databases_and_a_second_up_starts_nothing(head, database):
    before = pids(head)
    out = head.up(*HEAD)
    assert sorted(before) == ["mlflow", "prefect", "worker"]
    assert pids(head) == before
    assert f"Prefect: http://127.0.0.1:{head.prefect}   deployment reproduce/shapes, schedule off" in out
    assert f"MLflow:  http://127.0.0.1:{head.mlflow}, artifacts in mlartifacts\n" in out
    assert f"python -m flows.worker join --server {head.api} --pool gpu\n" in out
    assert database.sql("SELECT name FROM deployment ORDER BY name", database="prefect_shared").split() == [
        "gpu",
        "shapes",
    ]
    assert _ask(f"{head.api}/work_pools/gpu")["type"] == "process"
    assert database.sql("SELECT username, is_admin FROM users", database="mlflow_shared") == f"{USER}|t"
    # A run of any machine finds the experiment: none has to make it, and no two can at once.
    assert "modelstock" in database.sql("SELECT name FROM experiments", database="mlflow_shared").split()
    files = [path.name for path in head.folder.rglob("*.db*")]
    assert files == []


@pytest.mark.cluster
def test_a_run_of_the_deployment_runs_at_the_head(head):
    head.a_run_completes()
    assert (head.folder / "out.txt").read_text() == "done"


@pytest.mark.cluster
def test_a_run_that_lasts_ends_with_its_stage_when_it_is_cancelled(head):
    (head.folder / "slow").write_text("600")
    (head.folder / "in.txt").write_text("cancelled")
    run = head.run()
    _, stage = head.begun(run)
    assert f"flow run {_ask(f'{head.api}/flow_runs/{run}')['name']}: running" in head("status").stdout
    _ask(f"{head.api}/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert within(60, lambda: head.state(run)[0] == "CANCELLED"), head.state(run)
    assert within(20, lambda: not Path(f"/proc/{stage}").exists())


@pytest.mark.cluster
def test_who_has_no_password_or_a_wrong_one_is_let_in_by_neither_server(head):
    prefect = f"{head.api}/flows/filter"
    mlflow = f"http://127.0.0.1:{head.mlflow}/api/2.0/mlflow/experiments/get?experiment_id=0"
    pages = f"http://127.0.0.1:{head.mlflow}/"
    assert [status_of(prefect, who, b"{}") for who in (None, "ann:wrong", AUTH)] == [401, 401, 200]
    for url in (mlflow, pages):
        assert [status_of(url, who) for who in (None, f"{USER}:wrong", f"{USER}:{PASSWORD}")] == [401, 401, 200]


@pytest.mark.cluster
def test_passwords_are_in_no_command_line_and_no_log_and_flows_find_none_of_the_databases(head):
    secrets = [HARD, *(head.env[f"MODELSTOCK_{name}_DB"].split(":")[2].split("@")[0] for name in ("PREFECT", "MLFLOW"))]
    secrets += [PASSWORD, AUTH.partition(":")[2]]
    processes = [path for path in Path("/proc").glob("[0-9]*/cmdline")]
    lines = b""
    for path in processes:
        try:
            lines += path.read_bytes()
        except OSError:
            continue
    assert b"mlflow\0server" in lines
    assert [secret for secret in secrets if secret.encode() in lines] == []
    folder = head.folder / ".services"
    logs = "".join(path.read_text() for path in folder.glob("*.log"))
    assert [secret for secret in secrets if secret in logs] == []
    shared = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o077]
    assert [path for path in shared if folder / "prefect/storage" not in path.parents] == []
    worker = Path(f"/proc/{pids(head)['worker']}/environ").read_bytes().decode().split("\0")
    assert [line for line in worker if "postgresql" in line or line.startswith("MODELSTOCK_MLFLOW_PASSWORD")] == []
    assert f"MLFLOW_TRACKING_PASSWORD={PASSWORD}" in worker


@pytest.mark.cluster
def test_a_machine_without_the_folder_sends_and_gets_artifacts_through_the_server(head, tmp_path):
    program = """
import sys
from pathlib import Path
from modelstock.tracking.mlflow import MlflowTracker
tracker = MlflowTracker(Path.cwd())
run = tracker.client.create_run(tracker.experiment)
tracker.client.log_artifact(run.info.run_id, "weights")
print(Path(tracker.client.download_artifacts(run.info.run_id, "weights", "."), ).read_bytes() == b"x" * 5_000_000)
print(run.info.artifact_uri)
"""
    (tmp_path / "weights").write_bytes(b"x" * 5_000_000)
    env = {k: v for k, v in head.env.items() if not k.startswith("MODELSTOCK")}
    shell = f'. {head.folder}/.services/head.env; "{sys.executable}" -c "$0"'
    done = subprocess.run(["sh", "-c", shell, program], cwd=tmp_path, env=env, capture_output=True, text=True)
    same, address = done.stdout.split()[-2:]
    assert (same, address.partition(":")[0]) == ("True", "mlflow-artifacts"), done.stderr
    kept = head.folder / "mlartifacts" / address.partition(":/")[2] / "weights"
    assert kept.stat().st_size == 5_000_000
    assert oct((head.folder / "mlartifacts").stat().st_mode)[-3:] == "700"


@pytest.mark.cluster
def test_other_settings_are_refused_while_services_run_and_change_nothing(head):
    before = pids(head)
    local = head("up")
    head.env["MODELSTOCK_MLFLOW_ARTIFACTS"] = "elsewhere"
    other = head("up", *HEAD)
    del head.env["MODELSTOCK_MLFLOW_ARTIFACTS"]
    expected = "expected services with these settings, or none; end them first: make down\n"
    assert local.stderr == f"error: --profile local: got prefect that runs with profile head; {expected}"
    assert other.stderr == f"error: --profile head: got prefect that runs with other settings; {expected}"
    assert pids(head) == before


@pytest.mark.cluster
def test_databases_that_do_not_do_are_refused(database):
    database.database("alone", HARD)
    with pytest.raises(HeadError) as refused:
        _database("MODELSTOCK_MLFLOW_DB", database.url("alone", "sesame"))
    assert str(refused.value) == (
        f'MODELSTOCK_MLFLOW_DB: got connection to server at "127.0.0.1", port {database.port} failed: FATAL: '
        'password authentication failed for user "alone"; expected a database that answers and takes the user; '
        "correct MODELSTOCK_MLFLOW_DB, or create the database: docs/cluster.md"
    )
    database.sql("CREATE ROLE guest LOGIN PASSWORD 'guest'", "CREATE DATABASE guest")
    with pytest.raises(HeadError) as refused:
        _database("MODELSTOCK_MLFLOW_DB", database.url("guest", "guest"))
    assert str(refused.value) == (
        "MODELSTOCK_MLFLOW_DB: got a user who may make no tables in guest; expected the owner of the database; "
        "ALTER DATABASE guest OWNER TO the user: docs/cluster.md"
    )


@pytest.mark.cluster
def test_one_database_for_both_is_refused(settings, project, database):
    project(*REMOTE)
    url = database.database("for_both", HARD)
    head = settings(MODELSTOCK_PREFECT_DB=url, MODELSTOCK_MLFLOW_DB=url.replace("127.0.0.1", "localhost"))
    with pytest.raises(HeadError) as refused:
        check(head)
    assert str(refused.value) == (
        "MODELSTOCK_MLFLOW_DB: got the database of MODELSTOCK_PREFECT_DB; expected one of its own: "
        "both keep a table of "
        "the same name; create another: docs/cluster.md"
    )


@pytest.mark.cluster
def test_others_reach_mlflow_by_this_machines_names_and_pages_of_others_change_nothing(database, tmp_path):
    port = free_port()
    url = database.database("named", HARD)
    head = Head("0.0.0.0", 1, port, "mlartifacts", url, url, AUTH, USER, PASSWORD)
    options, env = head.mlflow_server(tmp_path, Path())
    # The server listens here alone; which names it takes is what its environment says.
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with subprocess.Popen([*command, *options], cwd=tmp_path, env={**os.environ, **env}) as server:
        try:
            address, who = f"http://127.0.0.1:{port}", f"{USER}:{PASSWORD}"
            assert within(60, lambda: _answers(f"{address}/health"))
            name = f"{socket.gethostname()}:{port}"
            search, body = f"{address}/ajax-api/2.0/mlflow/experiments/search", b'{"max_results": 1}'
            hosts = (name, f"127.0.0.1:{port}", "localhost:1234", f"elsewhere.example:{port}")
            assert [status_of(search, who, body, host=host) for host in hosts] == [200, 200, 200, 403]
            for origin, status in ((f"http://{name}", 200), ("http://elsewhere.example", 403)):
                assert status_of(search, who, body, host=name, origin=origin) == status
        finally:
            server.terminate()


def _answers(url):
    try:
        return status_of(url) == 200
    except OSError:
        return False


@pytest.mark.cluster
def test_what_the_servers_know_outlives_them_and_mlflow_keeps_its_first_password(tmp_path, database, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with a_head(tmp_path, database, "again") as services:
        services.up(*HEAD)
        schedules = f"{services.api}/deployments/{services.deployment['id']}/schedules"
        (schedule,) = services.deployment["schedules"]
        _ask(f"{schedules}/{schedule['id']}", {"active": True}, method="PATCH")
        services.kill("prefect", "mlflow", "worker")
        assert "schedule on (cron 0 2 * * *, UTC)" in services.up(*HEAD)
        services.a_run_completes()
        done = services("down")
        assert done.stdout.split() == ["worker:", "stopped", "prefect:", "stopped", "mlflow:", "stopped"]
        left = [path for path in (tmp_path / ".services").iterdir() if path.is_file()]
        assert [p.name for p in left if b"fect $" in p.read_bytes() or b"%%40" in p.read_bytes()] == []
        services.env["MODELSTOCK_MLFLOW_PASSWORD"] = "another of twelve"
        refused = services("up", *HEAD)
        assert (refused.returncode, refused.stderr) == (
            1,
            "error: MODELSTOCK_MLFLOW_USER and MODELSTOCK_MLFLOW_PASSWORD: got a password that MLflow "
            "refuses; expected "
            "that of its database, which keeps the first one; make down, then start with the first one; "
            "docs/cluster.md says how to change it\n",
        )
