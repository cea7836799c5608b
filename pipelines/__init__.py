"""Commands. Each reads its arguments, makes one call and prints a table.

`train.py` and `sweep.py` are the main ones; `common.py` has what all commands share.
"""
