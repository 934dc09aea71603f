"""What a supernet is, and what each of its shapes costs.

The files whose names end in `_supershaper`, `elastic.py` and `narrowing.py` are copied beside every saved model.
"""
