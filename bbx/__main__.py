"""`python -m bbx`, the same as `bbx`."""

from bbx.cli import main

main()
