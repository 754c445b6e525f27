"""What a head machine has beyond `make up`: databases of PostgreSQL, passwords, and an address that others reach.

docs/cluster.md has the settings. All that is wrong with them is refused before a server starts.
"""

import hashlib
import importlib.util
import ipaddress
import json
import os
import re
import secrets
import shlex
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil

from modelstock.errors import ModelstockError, redacted

LOOPBACK = "127.0.0.1"
PAGE = "docs/cluster.md"
PREFECT_DB, MLFLOW_DB, HOST = "MODELSTOCK_PREFECT_DB", "MODELSTOCK_MLFLOW_DB", "MODELSTOCK_HOST"
MLFLOW_USER, MLFLOW_PASSWORD = "MODELSTOCK_MLFLOW_USER", "MODELSTOCK_MLFLOW_PASSWORD"
PREFECT_AUTH = "PREFECT_SERVER_API_AUTH_STRING"
MLFLOW_ARTIFACTS = "MODELSTOCK_MLFLOW_ARTIFACTS"
ENVIRONMENT = "head.env"  # for a shell at the head
AUTH_FILE = "mlflow-auth.ini"
SECRETS = (ENVIRONMENT, AUTH_FILE)  # files with passwords: while the services run
FORM = "postgresql:// and user:password@host:port/database"  # apart, or it would be hidden as a password is
SHORTEST = 12  # characters that MLflow asks of a password


class HeadError(ModelstockError):
    """A setting of the head machine is missing or wrong, or what it names cannot be reached."""


@dataclass(frozen=True)
class Head:
    """The settings of a head machine."""

    host: str
    prefect_port: int
    mlflow_port: int
    artifacts: str
    prefect_db: str = field(repr=False)
    mlflow_db: str = field(repr=False)
    prefect_auth: str = field(repr=False, default="")  # "user:password"; empty: no authentication
    mlflow_user: str = field(repr=False, default="")
    mlflow_password: str = field(repr=False, default="")

    @property
    def fingerprint(self) -> str:
        """What tells these settings from others."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def near(self) -> str:
        """The address by which this machine reaches its own servers."""
        return {"0.0.0.0": LOOPBACK, "::": "[::1]"}.get(self.host) or _in_url(self.host)

    @property
    def far(self) -> str:
        """The address by which other machines reach them."""
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else _in_url(self.host)

    def clients(self, root: Path, folder: Path) -> dict[str, str]:
        """The environment of the worker at the head and of the flows and stages that it runs."""
        return {
            "PREFECT_HOME": str(root / folder / "prefect"),
            "PREFECT_API_URL": f"http://{self.near}:{self.prefect_port}/api",
            "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_TRACKING_URI": f"http://{self.near}:{self.mlflow_port}",
            "MODELSTOCK_MLFLOW_URL": f"http://{self.far}:{self.mlflow_port}",  # where people look
            **self._passwords(),
        }

    def _passwords(self) -> dict[str, str]:
        """What authentication asks of those who reach the servers."""
        prefect = {"PREFECT_API_AUTH_STRING": self.prefect_auth} if self.prefect_auth else {}
        mlflow = {"MLFLOW_TRACKING_USERNAME": self.mlflow_user, "MLFLOW_TRACKING_PASSWORD": self.mlflow_password}
        return prefect | (mlflow if self.mlflow_user else {})

    def prefect_server(self) -> dict[str, str]:
        """What Prefect's server finds beyond what its clients do."""
        return {
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # In files, a slot's lease outlives the server, and ends some minutes after the run that renewed it.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": _for_asyncpg(self.prefect_db),
            "PREFECT_UI_API_URL": f"http://{self.far}:{self.prefect_port}/api",  # what a browser asks
            **({PREFECT_AUTH: self.prefect_auth} if self.prefect_auth else {}),
        }

    def mlflow_server(self, root: Path, folder: Path) -> tuple[list[str], dict[str, str]]:
        """The options and the environment of MLflow's server; with authentication, `folder` gets what it needs.

        Everyone on the machine can read a command line, so all that may hold a password is in the environment or in
        a file of the owner's.
        """
        artifacts = root / self.artifacts
        artifacts.mkdir(mode=0o700, parents=True, exist_ok=True)
        env = {
            "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_BACKEND_STORE_URI": self.mlflow_db,
            "MLFLOW_ARTIFACTS_DESTINATION": str(artifacts),
        }
        if not is_loopback(self.host):
            names = _names(self.far)
            # MLflow refuses requests by names that it does not know, and its own pages where they come from elsewhere.
            hosts = [*(f"{name}:{self.mlflow_port}" for name in names), "localhost:*", f"{LOOPBACK}:*"]
            env["MLFLOW_SERVER_ALLOWED_HOSTS"] = ",".join(hosts)
            env["MLFLOW_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(f"http://{n}:{self.mlflow_port}" for n in names)
        if not self.mlflow_user:
            return [], env
        config = root / folder / AUTH_FILE
        _write_private(config, AUTH_CONFIG.format(url=self.mlflow_db.replace("%", "%%")))  # as configparser reads it
        key = root / folder / "mlflow.key"
        if not key.exists():
            _write_private(key, secrets.token_hex(32))
        env |= {
            "MLFLOW_AUTH_CONFIG_PATH": str(config),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": key.read_text(encoding="utf-8"),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.mlflow_user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.mlflow_password,
        }
        return ["--app-name", "basic-auth"], env

    def write_environment(self, root: Path, folder: Path) -> Path:
        """A file for a shell at the head, with what its commands need to reach the servers."""
        file = folder / ENVIRONMENT
        env = self.clients(root, folder)
        _write_private(root / file, "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items()))
        return file

    def joining(self, pool: str) -> list[str]:
        """Lines that say how a GPU machine joins: the command, and what it finds in its environment."""
        command = f"python -m flows.worker join --server http://{self.far}:{self.prefect_port}/api --pool {pool}"
        needs = [f"MLFLOW_TRACKING_URI=http://{self.far}:{self.mlflow_port}", *self._passwords()]
        return [f"A GPU machine joins with: {command}", f"  and finds in its environment: {', '.join(needs)}"]


# Users of MLflow lie beside its store, in tables of their own. A password is checked once a minute and not at each
# request, as its hash is slow on purpose; the server is one process, which knows when a password is changed.
AUTH_CONFIG = """[mlflow]
default_permission = READ
database_uri = {url}
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
auth_cache_ttl_seconds = 60
"""


def _write_private(file: Path, text: str) -> None:
    """Write a file that its owner alone reads, from its first byte on."""
    file.unlink(missing_ok=True)
    with os.fdopen(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _names(far: str) -> list[str]:
    """The names and addresses by which others may call this machine."""
    addresses = [a.address for of_one in psutil.net_if_addrs().values() for a in of_one if a.family == socket.AF_INET]
    return sorted({far, socket.gethostname(), socket.getfqdn(), *addresses})


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Raises:
        HeadError: it is no address or name that this machine knows.
    """
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        expected = f"an address or a name of this machine, as {LOOPBACK}"
        raise HeadError(HOST, got=f"{host!r}: {error.strerror}", expected=expected, cure=f"see {PAGE}") from error
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


# Characters of a user's name, a password, a host or a database: what would end it is written as %40 and the like.
PART = r"(?:[^\s:@/?#%\[\]]|%[0-9A-Fa-f]{2})"
DATABASE = re.compile(
    rf"postgresql://(?:{PART}+(?::{PART}*)?@)?(?:{PART}*|\[[0-9A-Fa-f:.]+\])(?::\d+)?/{PART}+(?:\?[^\s#]*)?"
)


def _scheme(url: str) -> str:
    return url.partition("://")[0] if "://" in url else ""


def _for_asyncpg(url: str) -> str:
    """The URL as Prefect reads it, whose library of PostgreSQL calls `sslmode` by another name."""
    address, mark, options = url.partition("?")
    return f"postgresql+asyncpg{address.removeprefix('postgresql')}{mark}{options.replace('sslmode=', 'ssl=')}"


def head_settings(prefect_port: int, mlflow_port: int) -> Head:
    """The settings, from the environment; what they say is checked as far as nobody needs to be asked.

    Raises:
        HeadError: one is missing, or cannot be.
    """
    env = {name: value for name, value in os.environ.items() if value}
    for name, owner in ((PREFECT_DB, "Prefect"), (MLFLOW_DB, "MLflow")):
        url = env.get(name, "")
        if _scheme(url) != "postgresql":
            got = f"a URL of {_scheme(url)}" if _scheme(url) else "no URL" if url else "nothing"
            raise HeadError(
                name,
                got=got,
                expected=f"the database of {owner}, {FORM}",
                cure=f"set {name}: {PAGE} says how to create it",
            )
        if not DATABASE.fullmatch(url):  # what a library says of it might show a part of the password
            raise HeadError(
                name,
                got="a URL whose parts cannot be told from each other",
                expected=FORM,
                cure="write % as %25, @ as %40, : as %3A, / as %2F, ? as %3F and # as %23 in its parts",
            )
    options = set(parse_qs(urlsplit(env[PREFECT_DB]).query, keep_blank_values=True)) - {"sslmode", "host", "port"}
    if options:
        raise HeadError(
            PREFECT_DB,
            got=f"the option {min(options)}",
            expected="sslmode, host and port as options, which Prefect's library takes too",
            cure="leave it out",
        )
    head = Head(
        host=env.get(HOST, LOOPBACK),
        prefect_port=prefect_port,
        mlflow_port=mlflow_port,
        artifacts=env.get(MLFLOW_ARTIFACTS, "mlartifacts"),
        prefect_db=env[PREFECT_DB],
        mlflow_db=env[MLFLOW_DB],
        prefect_auth=env.get(PREFECT_AUTH, ""),
        mlflow_user=env.get(MLFLOW_USER, ""),
        mlflow_password=env.get(MLFLOW_PASSWORD, ""),
    )
    _check_passwords(head)
    _check_others(head, env)
    return head


def _check_passwords(head: Head) -> None:
    """Refuse authentication that is incomplete, or missing where others reach the servers.

    Raises:
        HeadError: it is.
    """
    if head.prefect_auth and not all(head.prefect_auth.partition(":")[::2]):
        raise HeadError(PREFECT_AUTH, got="no user, or no password", expected="user:password", cure=f"see {PAGE}")
    if bool(head.mlflow_user) != bool(head.mlflow_password):
        there, missing = (MLFLOW_USER, MLFLOW_PASSWORD) if head.mlflow_user else (MLFLOW_PASSWORD, MLFLOW_USER)
        raise HeadError(missing, got="nothing", expected=f"it beside {there}", cure=f"set it, or unset {there}")
    if head.mlflow_user and (":" in head.mlflow_user or len(head.mlflow_password) < SHORTEST):
        raise HeadError(
            f"{MLFLOW_USER} and {MLFLOW_PASSWORD}",
            got="a colon in the user's name" if ":" in head.mlflow_user else f"{len(head.mlflow_password)} characters",
            expected=f"a name without a colon and a password of {SHORTEST} characters or more",
            cure="choose others",
        )
    missing_on = {
        "Prefect": None if head.prefect_auth else PREFECT_AUTH,
        "MLflow": None if head.mlflow_user else f"{MLFLOW_USER} and {MLFLOW_PASSWORD}",
    }
    without = {server: setting for server, setting in missing_on.items() if setting}
    if without and not is_loopback(head.host):
        raise HeadError(
            f"{HOST}={head.host}",
            got=f"no authentication on {' and '.join(without)}",
            expected="authentication on both servers, as other machines reach this address",
            cure=f"set {' and '.join(without.values())}, or leave {HOST} at {LOOPBACK}: {PAGE}",
        )


def _check_others(head: Head, env: dict[str, str]) -> None:
    """Refuse settings of which another one, or a missing library, makes nothing.

    Raises:
        HeadError: there is one.
    """
    libraries = ["psycopg2", *(["flask_wtf"] if head.mlflow_user else [])]
    absent = [name for name in libraries if importlib.util.find_spec(name) is None]
    if absent:
        raise HeadError(
            "--profile head",
            got=f"no library {absent[0]}",
            expected="the extra cluster",
            cure="make setup, or pip install 'modelstock[cluster]'",
        )
    if "://" in head.artifacts:
        raise HeadError(
            MLFLOW_ARTIFACTS,
            got=f"a URL of {_scheme(head.artifacts)}",
            expected="a folder of this machine",
            cure="name one, or unset it: mlartifacts",
        )
    own = f"http://{head.near}:{head.mlflow_port}"
    if env.get("MLFLOW_TRACKING_URI", own) != own:
        raise HeadError(
            "MLFLOW_TRACKING_URI",
            got=env["MLFLOW_TRACKING_URI"],
            expected=f"nothing, or the server that the head starts: {own}",
            cure="unset it",
        )


def check(head: Head) -> None:
    """Look whether what the settings name is there: a DVC remote, and two databases that take the user.

    Raises:
        HeadError: it is not.
    """
    _check_remote()
    if _database(PREFECT_DB, head.prefect_db) == _database(MLFLOW_DB, head.mlflow_db):
        raise HeadError(
            MLFLOW_DB,
            got=f"the database of {PREFECT_DB}",
            expected="one of its own: both keep a table of the same name",
            cure=f"create another: {PAGE}",
        )


def _check_remote() -> None:
    from dvc.config import Config, ConfigError

    try:
        config = Config.from_cwd()
    except ConfigError as error:
        raise HeadError(".dvc/config", got=error, expected="DVC's settings", cure="see dvc config") from error
    name = config["core"].get("remote")
    if name not in config["remote"]:
        raise HeadError(
            "DVC",
            got="no default remote" if name is None else f"a default remote {name!r} that is not defined",
            expected="one by which machines exchange results",
            cure=f"dvc remote add -d NAME URL: {PAGE}",
        )


def _database(name: str, url: str) -> tuple[str, str]:
    """What tells a database from others; it is there, and its user may make tables.

    Raises:
        HeadError: it does not answer, refuses the user, or lets him make no tables.
    """
    import psycopg2

    try:
        connection = psycopg2.connect(url, connect_timeout=10)
    except (psycopg2.Error, UnicodeError) as error:
        raise HeadError(
            name,
            got=" ".join(redacted(error).split()),
            expected="a database that answers and takes the user",
            cure=f"correct {name}, or create the database: {PAGE}",
        ) from error
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT current_database(), pg_postmaster_start_time()::text, "
                "coalesce(has_schema_privilege(current_schema(), 'CREATE'), false)"
            )
            database, started, may = cursor.fetchone()
    finally:
        connection.close()
    if not may:
        raise HeadError(
            name,
            got=f"a user who may make no tables in {database}",
            expected="the owner of the database",
            cure=f"ALTER DATABASE {database} OWNER TO the user: {PAGE}",
        )
    return str(database), str(started)


def hide() -> None:
    """Take passwords out of this process's environment: its children get those that each needs, and no others."""
    for name in (PREFECT_DB, MLFLOW_DB, PREFECT_AUTH, MLFLOW_USER, MLFLOW_PASSWORD):
        os.environ.pop(name, None)
