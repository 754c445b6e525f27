"""A PostgreSQL server of one test, from Debian's package postgresql: no settings of the machine's are used."""

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.support.ports import free_port

INSTALLED = Path("/usr/lib/postgresql")
OWNER = "postgres"  # the server refuses to run as root: root starts it as this user of the package


def programs() -> Path | None:
    """The folder of the newest installed version's programs."""
    found = sorted(INSTALLED.glob("*/bin/initdb"), key=lambda file: int(re.sub(r"\D", "", file.parts[4]) or 0))
    return found[-1].parent if found else None


@dataclass(frozen=True)
class Postgres:
    """A running server on 127.0.0.1, whose users need passwords."""

    port: int
    sockets: Path

    def sql(self, *statements: str, database: str = "postgres") -> str:
        """Run statements as the superuser, by the socket that he alone has; what the last one selects."""
        command = ["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", str(self.sockets), "-p", str(self.port)]
        words = [word for statement in statements for word in ("-c", statement)]
        done = _as_owner([*command, "-U", OWNER, "-d", database, *words])
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def database(self, name: str, password: str) -> str:
        """A new database, owned by a new user of its name who is no superuser; its URL."""
        literal = password.replace("'", "''")
        self.sql(f"CREATE ROLE {name} LOGIN PASSWORD '{literal}'", f"CREATE DATABASE {name} OWNER {name}")
        return self.url(name, password)

    def url(self, name: str, password: str) -> str:
        return f"postgresql://{name}:{quote(password, safe='')}@127.0.0.1:{self.port}/{name}"


def _as_owner(command: list[str]) -> "subprocess.CompletedProcess[str]":
    owner = pwd.getpwnam(OWNER) if os.geteuid() == 0 else None
    ids = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []} if owner else {}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", stdin=subprocess.DEVNULL, timeout=60, **ids)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server with an empty cluster in a temporary folder; a test is skipped where the package is not installed."""
    folder = programs()
    if folder is None or shutil.which("psql") is None:
        pytest.skip("Debian's package postgresql is not installed")
    with tempfile.TemporaryDirectory(prefix="postgres-") as name:
        place, port = Path(name), free_port()
        if os.geteuid() == 0:
            shutil.chown(place, OWNER)
        initdb = [folder / "initdb", "-D", place / "data", "-U", OWNER, "--no-sync", "-E", "UTF8", "--locale=C.UTF-8"]
        initdb += ["--auth-local=trust", "--auth-host=scram-sha-256"]
        done = _as_owner([str(word) for word in initdb])
        assert done.returncode == 0, done.stderr
        settings = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": place, "fsync": "off"}
        options = " ".join(f"-c {key}={value}" for key, value in settings.items())
        control = [str(folder / "pg_ctl"), "-D", str(place / "data"), "-w"]
        log = place / "log"
        started = _as_owner([*control, "-l", str(log), "-o", options, "start"])
        assert started.returncode == 0, started.stderr + (log.read_text() if log.exists() else "")
        try:
            yield Postgres(port, place)
        finally:
            _as_owner([*control, "-m", "immediate", "stop"])
