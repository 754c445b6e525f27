"""The experiment as a table of one comparison: which rows, which columns, in what order.

MLflow keeps a shared view as an experiment's tag; the page opens with it where its link names the tag's key.
"""

import json
from collections.abc import Mapping, Sequence

TAG = "mlflow.sharedViewState."
MERGES, ALL = "merges", "all"
NEW_SERVER = "http://127.0.0.1:5000"  # where `make up` starts one


def columns(metrics: Sequence[str], params: Sequence[str]) -> list[str]:
    """MLflow's names of a view's columns."""
    return [*(f"params.`{name}`" for name in params), *(f"metrics.`{name}`" for name in metrics)]


def view(*, search: str, order: str, shown: Sequence[str]) -> str:
    """The state of a page as MLflow reads it from a tag. `order`: the metric whose largest values come first."""
    state = {
        "searchFilter": search,
        "orderByKey": f"metrics.`{order}`",
        "orderByAsc": False,
        "selectedColumns": list(shown),
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
    }
    return json.dumps(state, sort_keys=True)


def tag(key: str) -> str:
    """The experiment's tag that holds the view of this key."""
    return f"{TAG}{key}"


def link(server: str, experiment: str, key: str) -> str:
    """The address of an experiment's page with a view."""
    page = f"{server.rstrip('/')}/#/experiments/{experiment}/runs"
    return f"{page}?workflowType=machine_learning&viewStateShareKey={key}"


def links(server: str, experiment: str, keys: Mapping[str, str]) -> list[str]:
    """Lines that say where each view is: `keys` is the views' titles by key."""
    return [f"MLflow, {title}: {link(server, experiment, key)}" for key, title in keys.items()]
