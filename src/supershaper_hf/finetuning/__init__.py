"""From a supernet, a subnet or any other encoder to a model of one task, with its scores.

`task.py` says what a task consists of, `glue.py` makes the tasks of GLUE, `experiment.py` fine-tunes with every seed.
"""
