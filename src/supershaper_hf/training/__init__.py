"""Super pre-training.

`sandwich.py` computes one step, `loop.py` runs the loop around it; the other files are what a long run needs.
"""
