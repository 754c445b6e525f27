"""Work that is asked to end: it saves what it has and ends, and the same command run again goes on from there.

Who starts a stage names a file that is not there in MODELSTOCK_STOP, and makes the file when the stage is to end, say
before a time limit. Work that can go on later looks for it between its steps and raises AskedToEnd once it has saved;
other work runs to its end.
"""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from modelstock.errors import AskedToEnd

VARIABLE = "MODELSTOCK_STOP"


def may_be_asked() -> bool:
    """Whether a file is named at all."""
    return bool(os.environ.get(VARIABLE))


def asked_to_end() -> bool:
    """Whether the file is there."""
    return may_be_asked() and os.path.exists(os.environ[VARIABLE])


def end(words: Sequence[str], error: AskedToEnd) -> NoReturn:
    """End this process after a line on stderr. `words`: what it was started as.

    The exit code is EX_TEMPFAIL. Of several processes the first gives both: torchrun ends the others when one fails.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.exit(0)
    print(f"{' '.join(words)}: {error}", file=sys.stderr)
    sys.exit(os.EX_TEMPFAIL)
