"""`python -m exaonepath` is the `exaonepath` command."""

from exaonepath.cli.app import main

main()
