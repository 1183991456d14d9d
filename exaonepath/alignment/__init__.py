"""Slides and molecular profiles of patients in one embedding space: data, model, training, evaluation, studies."""
