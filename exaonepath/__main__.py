"""`python -m exaonepath` is the `exaonepath` command."""

from exaonepath.cli.app import main

if __name__ == "__main__":
    main()
