"""DVC's graph: which stages a run looks at, in what order, and which of them must run."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstock.errors import ModelstockError, nearest
from modelstock.files import atomic_path


class FlowError(ModelstockError):
    """The flow cannot start, or a stage failed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Stages in an order that respects `needs`; those in `dirty` must run, those in `device` occupy a device.

    `forced`: run also where DVC finds nothing changed.
    """

    needs: Mapping[str, frozenset[str]]
    dirty: frozenset[str]
    device: frozenset[str]
    forced: frozenset[str] = frozenset()


def kind_of(name: str) -> str:
    """What a stage has in common with those that differ in one item: `finetune` of `finetune@3`."""
    return name.partition("@")[0]


def choices(root: Path) -> list[str]:
    """The stages that can be named, each kind of several before them: `finetune`, `finetune@0`, ... No lock is needed.

    Raises:
        FlowError: not a DVC project, or a broken dvc.yaml.
    """
    from dvc.dvcfile import PROJECT_FILE, load_file
    from dvc.exceptions import DvcException
    from dvc.parsing import DataResolver
    from dvc.repo import Repo

    try:
        with Repo(str(root)) as repo:
            file = load_file(repo, str(root / PROJECT_FILE))
            names = list(DataResolver(repo, root, file.load()).get_keys())
    except DvcException as error:
        raise refused_by_dvc(root, error) from error
    listed: dict[str, None] = {}
    for name in names:
        listed |= dict.fromkeys((kind_of(name), name))
    return list(listed)


def _chosen(targets: list[str], names: list[str]) -> list[str]:
    """The stages that targets name, one by one or by their kind.

    Raises:
        FlowError: one names none.
    """
    stages: dict[str, None] = {}
    for target in targets:
        matches = [name for name in names if target in (name, kind_of(name))]
        if not matches:
            kinds = list(dict.fromkeys(map(kind_of, names)))
            expected, cure = f"{', '.join(kinds)}, or one stage of these", nearest(target, [*kinds, *names])
            raise FlowError("targets", got=repr(target), expected=expected, cure=cure)
        stages |= dict.fromkeys(matches)
    return list(stages)


def plan(root: Path, targets: list[str], *, force: bool = False) -> Plan:
    """Read the graph, and what must run, from DVC itself: the targets and all that they need; without targets all.

    A target is a stage or a kind of stages. `force`: the targets run even where nothing changed, and what they need
    does not for that reason; without targets every stage does.

    Raises:
        FlowError: not a DVC project, a broken dvc.yaml, or a target that is no stage.
    """
    from dvc.repo.reproduce import plan_repro

    with _opened(root, wait=True) as repo:
        by_name = {stage.addressing: stage for stage in repo.index.graph}
        chosen = _chosen(targets, list(by_name))
        order = plan_repro(repo.index.graph, [by_name[name] for name in chosen])
        forced = frozenset(chosen or (stage.addressing for stage in order)) if force else frozenset()
        return _plan(repo, order, forced=forced)


@contextmanager
def lock_in_order(root: Path, planned: Plan) -> Iterator[None]:
    """Let dvc.lock name the stages that are new to it after the block in the plan's order, as `dvc repro` does, and not
    in the order in which they ended.
    """
    file = root / "dvc.lock"
    before = _locked(root, file).get("stages", {})
    try:
        yield
    finally:
        after = _locked(root, file)
        stages = after.get("stages", {})
        new = [name for name in planned.needs if name in stages and name not in before]
        if new and new != [name for name in stages if name not in before]:
            for name in new:
                stages[name] = stages.pop(name)
            _write_lock(root, file, after)


def _locked(root: Path, file: Path) -> Any:
    from dvc.utils.serialize import parse_yaml_for_update

    with _opened(root, wait=True):
        return parse_yaml_for_update(file.read_text(encoding="utf-8"), str(file)) if file.exists() else {}


def _write_lock(root: Path, file: Path, content: Any) -> None:
    from dvc.utils.serialize import dumps_yaml

    with _opened(root, wait=True), atomic_path(file) as temporary:
        temporary.write_text(dumps_yaml(content), encoding="utf-8")


def plan_of_repro(options: Namespace) -> Plan:
    """What `dvc repro` with these options, as DVC's own parser gives them, looks at, in its order.

    Raises:
        FlowError: what DVC refuses, or another DVC at work in the project.
    """
    from dvc.dvcfile import PROJECT_FILE
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with _opened(Path.cwd(), wait=False) as repo:
        stages: list[Any] = []
        if not options.all_pipelines:
            targets = options.targets or [PROJECT_FILE]
            stages = collect_stages(repo, targets, recursive=options.recursive, glob=options.glob)
        whole = options.all_pipelines or options.pipeline  # DVC then ignores the options that narrow
        order = stages
        if whole or not options.single_item:
            graph = get_active_graph(repo.index.graph)
            downstream = options.downstream and not whole
            order = plan_repro(graph, stages, pipeline=options.pipeline, downstream=downstream)
        forced = frozenset(stage.addressing for stage in order) if options.force else frozenset[str]()
        return _plan(repo, order, forced=forced)


@contextmanager
def _opened(root: Path, *, wait: bool) -> Iterator[Any]:
    """DVC's view of the project, locked; waits for another DVC that is at work, or fails.

    Raises:
        FlowError: what DVC refuses in the block.
    """
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(str(root), _wait_for_lock=wait) as repo, lock_repo(repo):
            yield repo
    except (DvcException, LockError) as error:
        raise refused_by_dvc(root, error) from error


def refused_by_dvc(root: Path, error: Exception) -> FlowError:
    """What DVC refuses, as one line."""
    return FlowError(
        root,
        got=f"{type(error).__name__}: {' '.join(str(error).split())}",
        expected="a DVC project",
        cure="run in the repository's root, after `make setup`",
    )


def _plan(repo: Any, order: list[Any], *, forced: frozenset[str]) -> Plan:
    """The plan of these stages: what changed or is forced must run, and all that depends on it, except on a gate."""
    import networkx

    graph = repo.index.graph  # an edge points from a stage to one that it needs
    chosen, changed = set(order), set(repo.status())
    must = changed | forced
    dirty = {stage for stage in graph if stage.addressing in must or stage.always_changed}
    for stage in list(dirty):
        if not (stage.meta or {}).get("gate"):
            dirty |= networkx.ancestors(graph, stage)
    return Plan(
        needs={s.addressing: frozenset(d.addressing for d in graph.successors(s) if d in chosen) for s in order},
        dirty=frozenset(stage.addressing for stage in order if stage in dirty),
        device=frozenset(stage.addressing for stage in order if (stage.meta or {}).get("device")),
        forced=forced,
    )
