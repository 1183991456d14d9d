"""Whole evaluations of trained models, and the ablations that train them: settings in, JSON, tables and figures out."""
