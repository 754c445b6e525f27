"""torchrun, which ends as its processes do where they were asked to end: with EX_TEMPFAIL rather than a traceback."""

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def launch() -> None:
    """Run torchrun with this process's arguments."""
    try:
        main()
    except ChildFailedError as error:
        if any(failure.exitcode == os.EX_TEMPFAIL for failure in error.failures.values()):
            sys.exit(os.EX_TEMPFAIL)
        raise


if __name__ == "__main__":
    launch()
