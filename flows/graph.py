"""DVC's graph: which stages a run looks at, in what order, and which of them must run."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelstock.errors import ModelstockError


class FlowError(ModelstockError):
    """The flow cannot start, or a stage failed."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Stages in an order that respects `needs`; those in `dirty` must run, those in `device` occupy a device."""

    needs: Mapping[str, frozenset[str]]
    dirty: frozenset[str]
    device: frozenset[str]


def plan(root: Path, targets: list[str], *, force: bool = False) -> Plan:
    """Read the graph, and what must run, from DVC itself: the targets and all that they need; without targets all.

    Raises:
        FlowError: not a DVC project, a broken dvc.yaml, or a target that is no stage.
    """
    from dvc.repo.reproduce import plan_repro

    with _opened(root, wait=True) as repo:
        by_name = {stage.addressing: stage for stage in repo.index.graph}
        for target in targets:
            if target not in by_name:
                raise FlowError(
                    "targets", got=repr(target), expected=", ".join(sorted(by_name)), cure="name one of these stages"
                )
        order = plan_repro(repo.index.graph, [by_name[target] for target in targets])
        return _plan(repo, order, force=force)


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
        return _plan(repo, order, force=options.force)


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
        raise FlowError(
            root,
            got=f"{type(error).__name__}: {' '.join(str(error).split())}",
            expected="a DVC project",
            cure="run in the repository's root, after `make setup`",
        ) from error


def _plan(repo: Any, order: list[Any], *, force: bool) -> Plan:
    """The plan of these stages: what changed must run, and all that depends on it, except on a gate."""
    import networkx

    graph = repo.index.graph  # an edge points from a stage to one that it needs
    chosen, changed = set(order), set(repo.status())
    dirty = {stage for stage in graph if stage.addressing in changed or stage.always_changed}
    for stage in list(dirty):
        if not (stage.meta or {}).get("gate"):
            dirty |= networkx.ancestors(graph, stage)
    return Plan(
        needs={s.addressing: frozenset(d.addressing for d in graph.successors(s) if d in chosen) for s in order},
        dirty=frozenset(stage.addressing for stage in order if force or stage in dirty),
        device=frozenset(stage.addressing for stage in order if (stage.meta or {}).get("device")),
    )
