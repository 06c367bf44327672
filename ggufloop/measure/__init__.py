"""Scores of a model and of loops on it: texts, tasks, speed, convergence; their statistics; sweeps."""
