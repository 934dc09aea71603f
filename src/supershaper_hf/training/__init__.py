"""Super pre-training.

`sandwich.py` is what one step computes, `loop.py` the loop around it; the other files are what a long run needs.
"""
