"""What one stage reads and wrote, between machines: DVC's cache and run-cache in a DVC remote.

A stage's *key* is DVC's own: the sha256 of its command, its parameters, the hashes of what it reads and the paths that
it writes. The run-cache has, below that key, a file per result, named by the sha256 of what it says: the hashes of the
outputs. So machines need to agree on nothing but the remote, and a result that is there is never computed again.
"""

import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flows.graph import FlowError, refused_by_dvc
from modelstock.errors import few, redacted
from modelstock.files import atomic_path

T = TypeVar("T")
PAUSES_S = (5.0, 20.0)  # before a remote that failed is asked again
Lock = dict[str, Any]  # what dvc.lock says of a stage: cmd, deps, params, outs


class RemoteError(FlowError):
    """The DVC remote did not do what was asked of it; it may when it is asked again."""


def patiently(work: Callable[[], T], say: Callable[[str], None]) -> T:
    """What `work` gives, which asks the remote; tried again where it fails, after a line to `say`.

    Raises:
        RemoteError: it failed each time.
    """
    for pause in PAUSES_S:
        try:
            return work()
        except RemoteError as error:
            say(f"{error}; again in {pause:.0f} s")
            time.sleep(pause)
    return work()


@dataclass(frozen=True, kw_only=True)
class Order:
    """A stage as the head wants it run: the key, what dvc.lock would say of it, and what it reads of other stages.

    `outs`: the paths that it writes. `inputs`: for each stage of which it reads outputs, these as dvc.lock has them.
    `force`: run it though its result is known.
    """

    name: str
    key: str
    lock: Lock
    outs: list[str]
    inputs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage wrote: path -> hash of each output, and the name of the run-cache's file that says so."""

    value: str
    lock: Lock

    @property
    def outs(self) -> dict[str, str]:
        """Path -> hash."""
        return {out["path"]: _hash_of(out) for out in self.lock["outs"]}


def _hash_of(entry: Mapping[str, Any]) -> str:
    return str(entry.get(entry.get("hash", "md5")) or entry.get("md5"))


def differences(ours: Lock, theirs: Lock) -> list[str]:
    """What differs between two stages' command, dependencies and parameters, `ours` first, a text each."""
    lines = []
    if ours["cmd"] != theirs["cmd"]:
        lines.append(f"command {ours['cmd']!r}, there {theirs['cmd']!r}")
    here, there = ({dep["path"]: _hash_of(dep)[:12] for dep in lock.get("deps", [])} for lock in (ours, theirs))
    for path in sorted({*here, *there}):
        if here.get(path) != there.get(path):
            lines.append(f"{path} {here.get(path, 'not read')}, there {there.get(path, 'not read')}")
    here, there = (
        {f"{file}: {key}": value for file, values in lock.get("params", {}).items() for key, value in values.items()}
        for lock in (ours, theirs)
    )
    for key in sorted({*here, *there}):
        if here.get(key) != there.get(key):
            lines.append(f"{key} {here.get(key)!r}, there {there.get(key)!r}")
    return lines


class Transport:
    """A project's DVC, and its remote; its methods may be called by any thread, and wait for other DVCs at work here.

    Raises:
        FlowError: what DVC refuses, in any of its methods.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._mutex = threading.Lock()  # a Repo is not for several threads at once
        self._sent: set[str] = set()  # hashes of outputs that the remote has

    @cached_property
    def _opened(self) -> Any:
        from dvc.repo import Repo

        logging.getLogger("dvc").setLevel(logging.ERROR)  # what it says on the way is no news here
        return Repo(str(self.root), _wait_for_lock=True)

    @contextmanager
    def _repo(self, asking: str = "") -> Iterator[Any]:
        """DVC's view of the project, locked. `asking`: what the block asks of the remote, if it does.

        Raises:
            RemoteError: the remote failed.
            FlowError: DVC refuses.
        """
        from dvc.exceptions import DvcException
        from dvc.lock import LockError
        from dvc.repo import lock_repo

        with self._mutex:
            try:
                with lock_repo(self._opened):
                    # What another machine has sent half, or a disk has damaged, is never taken for what it says it is.
                    for remote in self._opened.config["remote"].values():  # read anew each time that DVC is locked
                        remote["verify"] = True
                    yield self._opened
            except FlowError:
                raise
            except Exception as error:  # of DVC, or of whichever library reaches its remote
                if asking:
                    got = redacted(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
                    raise RemoteError(
                        "DVC remote", got=got, expected=f"to {asking}", cure="`dvc push` and `dvc pull` must work here"
                    ) from error
                if not isinstance(error, DvcException | LockError):
                    raise
                raise refused_by_dvc(self.root, error) from error

    def check_remote(self) -> str:
        """The remote's address, once it is known to answer.

        Raises:
            FlowError: no remote, one that does not answer, or one that has no run-cache.
        """
        with self._repo() as repo:
            from dvc.exceptions import DvcException

            try:
                odb = self._runs(repo)
            except (DvcException, ImportError) as error:  # none, or one of a kind whose library is not installed
                raise FlowError(
                    "DVC remote",
                    got=" ".join(str(error).split())[:200],
                    expected="a remote that every machine reaches",
                    cure="dvc remote add --default NAME ADDRESS",
                ) from error
            address = redacted(odb.fs.unstrip_protocol(odb.path))
            if odb.fs.protocol in ("http", "https"):
                raise FlowError(
                    "DVC remote", got=address, expected="one with a run-cache", cure="take another kind of remote"
                )
            try:
                if odb.fs.protocol == "local":
                    # A new remote is made by what is first sent to it, below a folder that is there: one that is not
                    # mounted would be made too, for this machine alone.
                    folder = Path(odb.path) if os.path.exists(odb.path) else Path(odb.path).parent
                    if not (folder.is_dir() and os.access(folder, os.W_OK)):
                        raise NotADirectoryError(f"{folder} is no folder that can be written to")
                odb.fs.exists(odb.fs.join(odb.path, "runs"))
            except Exception as error:  # of whichever library reaches it
                raise FlowError(
                    "DVC remote",
                    got=redacted(f"{address}: {type(error).__name__}: {error}")[:300],
                    expected="a remote that answers",
                    cure="`dvc push` must work on this machine",
                ) from error
            return address

    def check_transportable(self, names: Iterable[str]) -> None:
        """Refuse stages whose results no run-cache keeps, before anything runs.

        Raises:
            FlowError: it names them.
        """
        with self._repo() as repo:
            stages = [_stage(repo, name) for name in names]
        bad = [
            stage.addressing
            for stage in stages
            if not (stage.cmd and stage.deps and stage.outs)
            or stage.always_changed
            or any(out.persist or not out.use_cache for out in stage.outs)
        ]
        if bad:
            raise FlowError(
                "work pool",
                got=f"{few(bad)}: no deps, or an output that is not cached or persists",
                expected="stages whose results the run-cache keeps",
                cure="correct it in dvc.yaml, or take its meta.device away",
            )

    def order(self, name: str, reads: Mapping[str, frozenset[str]], *, force: bool = False) -> Order:
        """The order for a stage, whose inputs are here. `reads`: which outputs of which stages it reads.

        Raises:
            FlowError: an input is missing.
        """
        from dvc.stage.cache import _get_stage_hash

        with self._repo() as repo:
            stage = _stage(repo, name)
            stage.save_deps()
            inputs = {}
            for producer, paths in reads.items():
                outs = _lock_of(_stage(repo, producer)).get("outs", [])
                inputs[producer] = [dict(out) for out in outs if out["path"] in paths]
            return Order(
                name=name,
                key=_get_stage_hash(stage),
                lock=_without_outs(stage),
                outs=[out.def_path for out in stage.outs],
                inputs=inputs,
                force=force,
            )

    def send_inputs(self, order: Order) -> None:
        """Give the remote those inputs of a stage that it lacks.

        Raises:
            RemoteError: one is not in DVC's cache here, or cannot be sent.
        """
        with self._repo("send what the stage reads") as repo:
            for producer, outs in order.inputs.items():
                new = [out for out in outs if _hash_of(out) not in self._sent]
                if new:
                    self._push(repo, _with_outs(_stage(repo, producer), new))
                    self._sent |= {_hash_of(out) for out in new}

    def take_inputs(self, order: Order) -> None:
        """On the machine that runs a stage: bring what it reads of other stages, and nothing else, into the workspace.

        Raises:
            RemoteError: something is not in the remote, or damaged there.
        """
        with self._repo("take what the stage reads") as repo:
            read = {dep.fs_path for dep in _stage(repo, order.name).deps}
            for producer, outs in order.inputs.items():
                for out in _with_outs(_stage(repo, producer), outs):
                    # A file or folder inside of an output is brought alone.
                    inside = [path for path in read if out.fs.isin(path, out.fs_path)]
                    for part in [None] if out.fs_path in read or not inside else inside:
                        absent = _absent(repo, out, part)
                        if absent:
                            raise RemoteError(
                                out.def_path,
                                got=f"missing or damaged in the DVC remote: {few(absent)}",
                                expected="what the head has sent",
                                cure="run the flow again; if it says so again, delete that there, and run it again",
                            )
                        out.checkout(force=True, filter_info=part)

    def compare(self, order: Order) -> None:
        """Refuse to run a stage that is not the one of the order.

        Raises:
            FlowError: a command, a dependency or a parameter differs; it names them.
        """
        from dvc.stage.cache import _get_stage_hash

        with self._repo() as repo:
            stage = _stage(repo, order.name)
            stage.save_deps()
            if _get_stage_hash(stage) == order.key:
                return
            lines = differences(_without_outs(stage), order.lock)
        raise FlowError(
            f"stage {order.name}",
            got=few(lines) or f"other outputs: {few([out.def_path for out in stage.outs])}",
            expected="what the head has",
            cure="bring this machine to the head's commit and params.yaml, with nothing changed in them",
        )

    def written(self, order: Order) -> Result:
        """What a stage that has run here wrote.

        Raises:
            FlowError: what it read is no longer what it was when it began.
        """
        with self._repo() as repo:
            lock = _lock_of(_stage(repo, order.name))
        result = Result(value=_value(lock), lock=lock)
        if _key(lock) != order.key:
            raise FlowError(
                f"stage {order.name}",
                got=few(differences(lock, order.lock)),
                expected="inputs that stay as they are while it runs",
                cure="change nothing in this clone while it works for a pool",
            )
        return result

    def send(self, order: Order, result: Result) -> list[Result]:
        """Send what a stage wrote, and give the other results that the remote has for it. Where there are others,
        nothing is sent: which one counts is the head's to decide, and the first is there already.

        Raises:
            RemoteError: something cannot be sent.
        """
        with self._repo("send what the stage wrote") as repo:
            runs = self._runs(repo)
            known = _results(runs, order.key)
            # Other bytes that nobody can fetch any more do not count.
            others = [one for one in known if one.outs != result.outs and not self._absent(repo, order, one)]
            if not others:
                self._push(repo, _filled(repo, order, result).outs)  # also where it is known: something may be lost
                if result not in known:
                    _write(runs, order.key, result)
            return others

    def forget(self, order: Order, result: Result) -> None:
        """Take a result out of this machine's run-cache, which would restore it in a later run."""
        with self._repo() as repo:
            file = Path(repo.stage_cache._get_cache_path(order.key, result.value))
            file.unlink(missing_ok=True)
            with suppress(OSError):  # holds others, or is gone
                file.parent.rmdir()  # DVC fails over one that is empty

    def results(self, order: Order) -> list[Result]:
        """The results for a stage that the remote has, in the order of their names; several where machines differ."""
        with self._repo("say what results it has") as repo:
            return _results(self._runs(repo), order.key)

    def current(self, order: Order) -> Result | None:
        """What this machine's dvc.lock has for exactly this stage; None where it has another or none."""
        with self._repo() as repo:
            lock = _lock_of(_stage(repo, order.name))
        complete = all(_hash_of(out) != "None" for out in lock.get("outs", [])) and lock.get("outs")
        return Result(value=_value(lock), lock=lock) if complete and _key(lock) == order.key else None

    def fetch(self, order: Order, result: Result) -> bool:
        """Whether all files of a result are in DVC's cache here, or were in the remote and now are."""
        return not self.absent(order, result)

    def absent(self, order: Order, result: Result) -> list[str]:
        """As `fetch`: the files that are not here, and missing or damaged in the remote, as it names them."""
        with self._repo("take a result") as repo:
            return self._absent(repo, order, result)

    def _absent(self, repo: Any, order: Order, result: Result) -> list[str]:
        return [name for out in _filled(repo, order, result).outs for name in _absent(repo, out)]

    def restore(self, order: Order, result: Result) -> None:
        """Bring a result that was fetched into the workspace and dvc.lock, as if the stage had run. Never runs it.

        Raises:
            FlowError: what the stage reads has changed since it was ordered.
        """
        with self._repo() as repo:
            stage = _filled(repo, order, result)
            stage.save_deps()
            if _key(_lock_of(stage)) != order.key:
                raise FlowError(
                    f"stage {order.name}",
                    got=few(differences(_without_outs(stage), order.lock)),
                    expected="inputs that stay as they were when it was begun",
                    cure="run the flow again",
                )
            for out in stage.outs:
                out.checkout(force=True)
            stage.dump(update_pipeline=False)
            local = Path(repo.stage_cache._get_cache_path(order.key, result.value))
            local.parent.mkdir(parents=True, exist_ok=True)
            _dump(local, result.lock)

    def _runs(self, repo: Any) -> Any:
        """The remote as the run-cache sees it."""
        return repo.cloud.get_remote_odb(None, "push --run-cache", hash_name="md5-dos2unix")

    def _push(self, repo: Any, outs: Iterable[Any]) -> None:
        from dvc_data.hashfile.transfer import transfer

        for out in outs:
            used, remote = _used(out), repo.cloud.get_remote_odb(out.remote, "push", hash_name=out.hash_name)
            # Not `repo.cloud.push`: it takes for granted that files are there whose folder's list is.
            lost = transfer(out.cache, remote, used, jobs=remote.fs.jobs, cache_odb=out.cache).failed
            # DVC passes over what is nowhere.
            lost |= {one for one in used if not out.cache.exists(one.value) and not remote.exists(one.value)}
            if lost or not used:
                raise RemoteError(
                    out.def_path,
                    got=f"files that could not be sent: {few(_names(lost or {out.hash_info}))}",
                    expected="all of them in DVC's cache, and a remote with room",
                    cure="`dvc push` says more",
                )


def _used(out: Any, part: str | None = None) -> set[Any]:
    """The hashes of an output's files, or of a part of it; none of a folder whose list of files is nowhere."""
    from dvc.exceptions import DvcException

    if out.is_dir_checksum:
        with suppress(DvcException):
            out.get_dir_cache()
        if not out.cache.exists(out.hash_info.value):
            return set()  # DVC would ask at a terminal whether to go on without it
    return {one for objects in out.get_used_objs(filter_info=part).values() for one in objects}


def _names(hashes: Iterable[Any]) -> list[str]:
    """Hashes as a DVC remote names its files."""
    return sorted(f"{one.value[:2]}/{one.value[2:]}" for one in hashes)


def _absent(repo: Any, out: Any, part: str | None = None) -> list[str]:
    """Bring an output, or a part of it, into DVC's cache here; the files that are not there then, by their names."""
    used = _used(out, part)
    if not used:
        return _names([out.hash_info])
    lacking = {one for one in used if not out.cache.exists(one.value)}
    if lacking:
        repo.cloud.pull(lacking, remote=out.remote)
    # DVC does not count as failed what is missing on both sides, or what it found damaged and removed.
    return _names(one for one in lacking if not out.cache.exists(one.value))


def reads(root: Path) -> dict[str, dict[str, frozenset[str]]]:
    """Which outputs of which stages each stage reads: stage -> stage -> paths.

    Raises:
        FlowError: not a DVC project, or a broken dvc.yaml.
    """
    with Transport(root)._repo() as repo:
        graph = repo.index.graph
        found: dict[str, dict[str, frozenset[str]]] = {}
        for stage in graph:
            needs: dict[str, frozenset[str]] = {}
            for producer in graph.successors(stage):
                paths = {
                    out.def_path
                    for out in producer.outs
                    for dep in stage.deps
                    if dep.fs_path
                    and (out.fs.isin_or_eq(out.fs_path, dep.fs_path) or out.fs.isin(dep.fs_path, out.fs_path))
                }
                needs[producer.addressing] = frozenset(paths)
            found[stage.addressing] = needs
        return found


def _stage(repo: Any, name: str) -> Any:
    return repo.stage.load_one(name=name)


def _filled(repo: Any, order: Order, result: Result) -> Any:
    """The stage of an order as it is after a result."""
    from dvc.stage.loader import StageLoader

    stage = _stage(repo, order.name)
    StageLoader.fill_from_lock(stage, result.lock)
    return stage


def _lock_of(stage: Any) -> Lock:
    from dvc.stage.serialize import to_single_stage_lockfile

    lock: Lock = _plain(to_single_stage_lockfile(stage))
    return lock


def _plain(value: Any) -> Any:
    """Mappings and lists of any kind as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _without_outs(stage: Any) -> Lock:
    return {key: value for key, value in _lock_of(stage).items() if key != "outs"}


def _with_outs(stage: Any, outs: list[dict[str, Any]]) -> list[Any]:
    """A stage's outputs, those that are named, with these hashes."""
    from dvc.stage.loader import StageLoader

    StageLoader.fill_from_lock(stage, {"outs": outs})
    return [out for out in stage.outs if out.def_path in {entry["path"] for entry in outs}]


def _key(lock: Lock) -> str:
    from dvc.stage.cache import _get_cache_hash

    return str(_get_cache_hash(_plain(lock), key=True))


def _value(lock: Lock) -> str:
    from dvc.stage.cache import _get_cache_hash

    return str(_get_cache_hash(_plain(lock)))


def _results(runs: Any, key: str) -> list[Result]:
    """What a remote's run-cache has below a key; a file that does not say what its name is the sha256 of is none."""
    from dvc.utils.serialize import parse_yaml

    fs, folder = runs.fs, runs.fs.join(runs.path, "runs", key[:2], key)
    results = []
    try:
        files = sorted(fs.find(folder)) if fs.exists(folder) else []
    except FileNotFoundError:
        files = []
    for file in files:
        try:
            lock = _plain(parse_yaml(fs.read_text(file, encoding="utf-8"), file))
            if _value(lock) == fs.name(file) and _key(lock) == key:
                results.append(Result(value=fs.name(file), lock=lock))
        except Exception:  # a file that another machine is writing, or that is none of DVC's
            continue
    return results


def _write(runs: Any, key: str, result: Result) -> None:
    """Write a result's file below its key in a remote's run-cache."""
    from dvc.fs import LocalFileSystem, generic

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / result.value
        _dump(file, result.lock)
        generic.copy(LocalFileSystem(), str(file), runs.fs, runs.fs.join(runs.path, "runs", key[:2], key, result.value))


def _dump(file: Path, lock: Lock) -> None:
    from dvc.utils.serialize import dump_yaml

    with atomic_path(file) as temporary:
        dump_yaml(str(temporary), lock)
    os.utime(file)  # of several, DVC takes the newest
