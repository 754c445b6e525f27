"""An OpenSSH server on 127.0.0.1 that lets this user in with a key, as a DVC remote needs it."""

import contextlib
import getpass
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.ports import free_port

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin")


@dataclass(frozen=True)
class SSH:
    """Where the server is, and the file of the key that it lets in."""

    port: int
    key: Path

    def remote(self, folder: Path) -> str:
        """DVC's settings of a remote in a folder of the server, named `shared`."""
        url = f"ssh://{getpass.getuser()}@127.0.0.1:{self.port}{folder}"
        # Its host key is new with each test; DVC asks for none where it is told of no file that holds some.
        return f"['remote \"shared\"']\nurl = {url}\nkeyfile = {self.key}\n"


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[SSH]:
    """A server until the end of the block."""
    assert SSHD, "Debian's package openssh-server"
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    shutil.copy(folder / "user.pub", folder / "authorized")
    port = free_port()
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        f"HostKey {folder / 'host'}",
        f"AuthorizedKeysFile {folder / 'authorized'}",
        f"PidFile {folder / 'pid'}",
        "StrictModes no",
        "UsePAM no",
        "PermitRootLogin prohibit-password",
        "PasswordAuthentication no",
        "Subsystem sftp internal-sftp",
    ]
    (folder / "config").write_text("\n".join(lines) + "\n")
    Path("/run/sshd").mkdir(exist_ok=True)
    with open(folder / "log", "w") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            assert server.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield SSH(port, folder / "user")
    finally:
        server.terminate()
        server.wait()
