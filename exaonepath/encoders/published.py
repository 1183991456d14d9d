"""The published weights that are loaded where a user names none."""

DEFAULT_WEIGHTS = "LGAI-EXAONE/EXAONE-Path-2.5"
