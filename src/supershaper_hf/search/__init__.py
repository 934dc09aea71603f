"""Measure the loss of some shapes, predict the loss of all others, and find the best shape for every budget."""
