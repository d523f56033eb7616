"""Evaluation: held-out loss by position, agreement with the teacher, recall, tasks; of checkpoints and artifacts alike.

`scorer` makes one face of a torch model and an artifact's session; each measurement is a module of functions of it.
Importing the package loads neither torch nor a runtime.
"""

from ligerexport.measure.evaluate.run import evaluate as evaluate
