"""`python -m exaonepath` is the `exaonepath` command."""

from exaonepath.cli import main

main()
