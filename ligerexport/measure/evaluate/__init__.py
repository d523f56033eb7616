"""Evaluate checkpoints and artifacts: held-out loss by position, agreement with the teacher, recall, tasks.

Each measurement is a module with functions of an `Opened` model; `evaluate` runs them.
"""
