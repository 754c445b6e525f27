"""The command itself: every subcommand by name, and errors as one line."""

import sys
from collections.abc import Callable

import typer

from modelstock.cli.checkpoints import diff, inspect
from modelstock.cli.comparison import compare
from modelstock.cli.data import prepare
from modelstock.cli.extras import missing_extra
from modelstock.cli.geometry import geometry
from modelstock.cli.merging import merge, methods, statistics
from modelstock.cli.models import anchor, export
from modelstock.cli.scoring import evaluate
from modelstock.cli.significance import significance
from modelstock.errors import AskedToEnd, ModelstockError
from modelstock.notices import printed
from modelstock.stopping import end

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prepare data, merge fine-tuned checkpoints exactly, score them in one pass, compare and export them.",
    rich_markup_mode="rich",
)
CORE: tuple[Callable[..., None], ...] = (merge, methods, inspect, diff, geometry)
TRAIN: tuple[Callable[..., None], ...] = (prepare, anchor, statistics, evaluate, compare, export)
STATISTICS: tuple[Callable[..., None], ...] = (significance,)
NEEDS = r"Needs the extra train: pip install 'modelstock\[train]'"
for command in CORE:
    app.command(rich_help_panel="Merging and inspecting")(command)
for command in TRAIN:
    app.command(rich_help_panel="Data, models and scores, with the extra train", epilog=NEEDS)(command)
for command in STATISTICS:
    needs = NEEDS.replace("train", "statistics")
    app.command(rich_help_panel="Statistics of anybody's results, with the extra statistics", epilog=needs)(command)


def main() -> None:
    """Run the command; an error that a user can fix is one line on stderr and exit code 1.

    A pass that was asked to end and is kept ends with a line and EX_TEMPFAIL; see modelstock.stopping.
    """
    try:
        try:
            with printed():
                app()
        except ModuleNotFoundError as error:
            raise missing_extra(" ".join(["modelstock", *sys.argv[1:2]]), error) from error
    except AskedToEnd as error:
        end(["modelstock", *sys.argv[1:2]], error)
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
