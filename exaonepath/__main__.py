"""The `exaonepath` command, installed or as `python -m exaonepath`: a look at the tables it names, then the command."""

import sys


def main() -> None:
    """Entry point: what is wrong with a table is told before what takes seconds is imported."""
    from exaonepath.early_checks import tell_problems

    if tell_problems(sys.argv[1:]):
        raise SystemExit(1)
    from exaonepath.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
