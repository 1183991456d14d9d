"""Ablation studies: training of variants, their evaluation, and JSON, tables and figures of the results."""
