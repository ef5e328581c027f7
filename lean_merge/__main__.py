"""`python -m lean_merge` is the command `lean-merge`."""

from lean_merge.cli import main

main()
