"""Into a supernet and out of it.

A BERT or a checkpoint of the 2021 repository becomes a supernet; a subnet is cut out of a saved supernet.
"""
