"""Evaluation: held-out loss by position, agreement with the teacher, recall, tasks; of checkpoints and artifacts alike.

Each measurement is a module of functions of an `Opened` model; `evaluate` runs them.
"""
