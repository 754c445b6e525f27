"""A Prefect server per module, and heads that know it."""

import pytest

from tests.support.cluster import Cluster, prefect_server, toy


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with prefect_server(tmp_path_factory.mktemp("server")) as env:
        yield env


@pytest.fixture
def make(tmp_path, server):
    """Makes the small project's head: how long its seeds take, files that differ, and its machines' environment."""
    clusters = []

    def one(seconds=0.2, files=None, **env):
        folder = tmp_path / f"cluster-{len(clusters)}"
        clusters.append(Cluster(folder, {**toy(str(folder / "remote"), seconds), **(files or {})}, {**server, **env}))
        return clusters[-1]

    yield one
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def cluster(make):
    return make()
