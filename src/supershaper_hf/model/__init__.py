"""What a supernet is, and what each of its shapes costs.

The files whose names end in `_supershaper`, and `elastic.py`, are copied beside every saved model.
"""
