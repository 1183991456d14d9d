"""The `exaonepath` command."""
