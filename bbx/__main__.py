"""`python -m bbx`, the same as `bbx`."""

from bbx.cli import run

run()
