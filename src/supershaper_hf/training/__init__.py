"""Super pre-training.

`sandwich.py` computes one step, and `loop.py` runs the loop around it. The other files hold what a long run needs.
"""
