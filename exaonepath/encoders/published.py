"""The published weights, which are the default."""

DEFAULT_WEIGHTS = "LGAI-EXAONE/EXAONE-Path-2.5"
