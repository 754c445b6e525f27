"""What commands print: tables, JSON and progress bars."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from modelstock.notices import so_far
from modelstock.progress import progress_bar


def show(title: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    """Print rows with the same keys, as a table, or as JSON: {"rows": [...], "notices": [...]}."""
    if as_json:
        print(json.dumps({"rows": rows, "notices": so_far()}, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, key in enumerate(rows[0] if rows else ["nothing"]):
        table.add_column(key, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for v in row.values()))
    Console().print(table)


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of the block on stderr: call what it gives with what is done, and of how much."""
    with progress_bar(desc=title, unit="value", unit_scale=True, mininterval=0.2, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update
