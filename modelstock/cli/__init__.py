"""The command `modelstock`, one module per group of commands.

`app`: the command itself, and the line that errors become; `options`: options that several commands share; `output`:
tables, JSON and progress bars; `extras`: which extra brings a library that is not installed.
`merging`: merge, statistics, methods; `checkpoints`: inspect, diff; `scoring`: evaluate; `comparison`: compare;
`significance`: significance;
`data`: prepare; `models`: anchor, export.

What costs time to import is imported inside the commands, so that `modelstock methods` starts at once.
"""

from modelstock.cli.app import main

__all__ = ["main"]
