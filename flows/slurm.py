"""Pilot workers in Slurm: jobs that join the head's work pool from inside an allocation.

`python -m flows.slurm submit` asks Slurm for them, with the options of deploy/slurm/worker.yaml, and ends; what a job
does is in deploy/slurm/worker.sbatch.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.command import run_command
from modelstock.errors import ModelstockError, closest

app = typer.Typer(add_completion=False, no_args_is_help=True)
CONFIG = Path("deploy/slurm/worker.yaml")
SCRIPT = Path("deploy/slurm/worker.sbatch")
END_S = 20  # of `signal_s`, for a worker whose stages have not ended to end them
EARLY_S = 60  # Slurm may send the signal this much earlier than it is asked to
# days-hours[:minutes[:seconds]], or minutes, minutes:seconds, hours:minutes:seconds
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}", re.ASCII)
# Options that this module or the script sets, and those that would make sbatch take the script for something else.
OURS = {
    *("account", "chdir", "cpus-per-task", "export", "gres", "mem", "no-requeue", "ntasks", "nodes", "open-mode"),
    *("array", "output", "parsable", "partition", "requeue", "signal", "test-only", "time", "wait", "wrap"),
}


class SlurmError(ModelstockError):
    """A pilot cannot be submitted."""


def seconds(time: str) -> int:
    """A time limit as Slurm writes it, in seconds."""
    if "-" in time:
        days, rest = time.split("-")
        hours, minutes, secs = [*map(int, rest.split(":")), 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    parts = [*map(int, time.split(":"))]
    hours, minutes, secs = parts if len(parts) == 3 else [0, *parts, 0][:3]
    return (hours * 60 + minutes) * 60 + secs


class Pilot(BaseModel):
    """What deploy/slurm/worker.yaml can say."""

    model_config = ConfigDict(extra="forbid", strict=True)
    server: str = Field(description="The head's Prefect server, as the nodes reach it: `http://HOST:4200/api`.")
    pool: str = Field(default="gpu", min_length=1, description="The work pool to join.")
    time: str = Field(description="A pilot's time limit, as sbatch takes it: `12:00:00`, `1-00:00:00`, minutes.")
    partition: str | None = Field(default=None, min_length=1, description="As sbatch's option; empty: Slurm's default.")
    account: str | None = Field(default=None, min_length=1, description="As sbatch's option.")
    gres: str | None = Field(default=None, min_length=1, description="As sbatch's option: `gpu:1`.")
    cpus_per_task: int | None = Field(default=None, ge=1, description="Processor cores of a pilot.")
    mem: str | None = Field(default=None, description="Memory of a pilot: `64G`.")
    slots: int = Field(default=0, ge=0, description="Stages at once; 0: one per GPU of the allocation.")
    signal_s: int = Field(
        default=120, ge=1, le=65535, description="Seconds before the time limit at which stages save and end."
    )
    idle_s: int = Field(default=600, ge=1, description="Seconds without work after which a pilot ends.")
    clones: str = Field(
        default="../modelstock-pilots",
        min_length=1,
        description="A folder that every node sees by the same path: pilots' clones and output.",
    )
    extra: list[str] = Field(
        default=[], description="Further options of sbatch, one each: `--constraint=a100`, `--qos=long`."
    )

    @model_validator(mode="before")
    @classmethod
    def _set(cls, raw: Any) -> Any:
        """A key without a value is one that is not set."""
        if not isinstance(raw, dict):
            raise ValueError("no settings, which are lines like `pool: gpu`")
        return {key: value for key, value in raw.items() if value is not None}

    @field_validator("time", "mem", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        """YAML reads minutes, and memory without a unit, as numbers."""
        return str(value) if type(value) is int else value

    @field_validator("server")
    @classmethod
    def _address(cls, server: str) -> str:
        try:
            url = urlsplit(server)
        except ValueError as error:
            raise ValueError(f"is not an address: {error}") from error
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("must be an address like http://HOST:4200/api")
        if url.username is not None or url.password is not None:
            raise ValueError("must not hold a password, which belongs in PREFECT_API_AUTH_STRING")
        return server

    @field_validator("time")
    @classmethod
    def _limit(cls, time: str) -> str:
        if not TIME.fullmatch(time):
            raise ValueError("must be a time limit like 12:00:00, 1-00:00:00 or 720 (minutes)")
        return time

    @field_validator("mem")
    @classmethod
    def _memory(cls, mem: str | None) -> str | None:
        if mem is not None and not re.fullmatch(r"[0-9]+[KMGT]?", mem):
            raise ValueError("must be an amount of memory like 64G, or 65536 (MB)")
        return mem

    @field_validator("extra")
    @classmethod
    def _options(cls, extra: list[str]) -> list[str]:
        for option in extra:
            name = option.removeprefix("--").partition("=")[0]
            if not re.fullmatch(r"--[a-z][a-z-]*(=.*)?", option):
                raise ValueError(f"{option!r} must be an option in its long form, like --qos=long")
            # sbatch takes the start of an option's name for the option.
            if any(ours.startswith(name) for ours in OURS):
                raise ValueError(f"{option!r} is not for `extra`: the other settings, or the pilot itself, say it")
        return extra

    @model_validator(mode="after")
    def _time_for_work(self) -> "Pilot":
        """A pilot that is warned as soon as it starts would be queued again without end."""
        if seconds(self.time) <= self.signal_s + EARLY_S:
            raise ValueError(
                f"time: {self.time} leaves no time for work: stages are asked to end signal_s = {self.signal_s} s "
                f"before it, and up to {EARLY_S} s earlier"
            )
        return self


def load(path: Path) -> Pilot:
    """Read and check the settings.

    Raises:
        SlurmError: no file, bad YAML, or every misspelt, missing and invalid setting in one line.
    """
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except OSError as error:
        cure = "name the file with --config, or run in the repository's root"
        raise SlurmError(path, got=error.strerror, expected="settings of pilots", cure=cure) from error
    except (YAMLError, ValueError) as error:
        got = " ".join(f"{error}".split())
        raise SlurmError(path, got=got, expected="YAML", cure="correct what it names") from error
    try:
        return Pilot.model_validate({} if raw is None else raw)
    except ValidationError as error:
        got = "; ".join(map(_problem, error.errors()))
        raise SlurmError(path, got=got, expected="valid settings", cure="correct them: docs/cluster.md") from None


def _problem(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        near = closest(place, list(Pilot.model_fields))
        return f"{place} is not a setting" + (f": did you mean {near}?" if near else "")
    if problem["type"] == "missing":
        return f"{place} is not set"
    text = problem["msg"].removeprefix("Value error, ")
    if not place:
        return str(text)
    shown = "" if place == "server" else f" (got {problem['input']!r})"  # an address may hold a password
    return f"{place}: {text}{shown}"


def command(pilot: Pilot, project: Path) -> list[str]:
    """The call of sbatch. Later options win, so what a pilot needs comes last."""
    clones = project / pilot.clones
    options = {
        "partition": pilot.partition,
        "account": pilot.account,
        "gres": pilot.gres,
        "cpus-per-task": pilot.cpus_per_task,
        "mem": pilot.mem,
        "time": pilot.time,
        "signal": f"B:USR1@{pilot.signal_s}",
        "chdir": project,
        "output": clones.resolve() / "pilot-%j.out",
        # Passwords travel in the environment, which nobody else can list; an argument would show them.
        "export": "ALL",
    }
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return ["sbatch", *pilot.extra, "--parsable", "--requeue", *given, str(project / SCRIPT)]


def variables(pilot: Pilot, project: Path) -> dict[str, str]:
    """What deploy/slurm/worker.sbatch reads."""
    return {
        "MODELSTOCK_PROJECT": str(project),
        "MODELSTOCK_CLONES": str((project / pilot.clones).resolve()),
        "MODELSTOCK_SERVER": pilot.server,
        "MODELSTOCK_POOL": pilot.pool,
        "MODELSTOCK_SLOTS": str(pilot.slots),
        "MODELSTOCK_IDLE_S": str(pilot.idle_s),
        "MODELSTOCK_DRAIN": str(max(1, pilot.signal_s - END_S)),
        # The script calls `python`: this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


@app.callback()
def main() -> None:
    """Pilot workers in Slurm."""


@app.command()
def submit(
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Pilots to submit.")] = 1,
    config: Annotated[Path, typer.Option("--config", help="What to ask Slurm for.")] = CONFIG,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the call of sbatch, and submit nothing.")] = False,
) -> None:
    """Submit pilots, and print the numbers of their jobs.

    Raises:
        SlurmError: invalid settings, no git checkout, no sbatch, or what sbatch refuses.
    """
    pilot, project = load(config), Path.cwd()
    if not (project / ".git").exists() or not SCRIPT.is_file():
        got = "no git checkout" if SCRIPT.is_file() else f"no {SCRIPT}"
        raise SlurmError(project, got=got, expected="a clone of the project", cure="run in the root of one")
    line, environment = command(pilot, project), variables(pilot, project)
    if dry_run:
        shown = [f"{name}={shlex.quote(value)}" for name, value in environment.items() if name != "PATH"]
        print(" \\\n  ".join([*shown, shlex.join(line)]))
        return
    if shutil.which(line[0]) is None:
        raise SlurmError(line[0], got="no such program", expected="Slurm's", cure="submit where Slurm's commands are")
    clones = Path(environment["MODELSTOCK_CLONES"])
    try:
        clones.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        cure = f"set `clones` in {config}"
        raise SlurmError(clones, got=error.strerror, expected="a folder for clones", cure=cure) from error
    for _ in range(jobs):
        done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True)
        number = done.stdout.strip().partition(";")[0]  # a cluster's name may follow
        if done.returncode != 0 or not number.isdecimal():
            got = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
            raise SlurmError(line[0], got=got, expected="a job", cure=f"correct {config}")
        print(number, flush=True)


if __name__ == "__main__":
    run_command(app)
