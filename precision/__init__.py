"""Which layers quantisation hurts, and which of them a memory budget should spare: the rooms behind `sensitivity.py`."""
