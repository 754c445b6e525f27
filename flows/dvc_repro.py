"""`dvc repro` with a line per stage of how far it is: `python -m flows.dvc_repro`, and DVC's own options.

This process is DVC: what it prints, its bars, its exit code, and what an interrupt does are DVC's own. The line is
made from the messages that DVC logs as it comes to each stage.
"""

import logging
import os
import re
import shlex
import sys
from contextlib import suppress

from flows.graph import FlowError, plan_of_repro
from flows.progress import SKIPS, Progress
from flows.workspace import ready, scratch
from modelstock.errors import ModelstockError

RUNS = re.compile(r"Running stage '(.+)':")


class Watch(logging.Handler):
    """Reads what DVC logs, and logs the line before DVC says that it runs a stage."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress
        self._running: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Follow DVC to the next stage."""
        message = record.getMessage()
        if record.name == "dvc.repo.reproduce" and record.levelno >= logging.WARNING:  # with --keep-going
            self.end(whole=False)
        elif found := SKIPS.fullmatch(message):
            self.end(whole=True)
            self._progress.skipped(found[1])
        elif found := RUNS.fullmatch(message):
            self.end(whole=True)
            self._running = found[1]
            logging.getLogger("dvc").info(self._progress.started(found[1]))

    def end(self, *, whole: bool) -> None:
        """The stage that runs, if one does, has ended."""
        if self._running is not None:
            self._progress.ended(self._running, whole=whole)
        self._running = None


def main(arguments: list[str]) -> int:
    """Run `dvc repro`, and return its exit code.

    Raises:
        ModelstockError: as `ready`.
    """
    with ready(shlex.join(["dvc", "repro", *arguments])):
        from dvc.cli import DvcParserError, parse_args
        from dvc.cli import main as dvc

        command, watch = ["repro", *arguments], None
        try:
            options = parse_args(command)
        except DvcParserError:  # has said why
            return 254  # as DVC
        if not (options.dry or options.quiet) and options.cd == ".":
            with suppress(FlowError):  # DVC refuses it in its own words
                watch = Watch(Progress(plan_of_repro(options)))
                logging.getLogger("dvc").handlers.insert(0, watch)  # before the handlers that print
        with scratch("repro", forced=options.force and not options.dry) as own:
            os.environ.update(own)
            code: int = dvc(command)
        if watch is not None:
            watch.end(whole=code == 0)
        return code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ModelstockError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(252)  # as DVC
