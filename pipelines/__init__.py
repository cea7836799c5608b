"""Commands. Each reads its arguments, makes one call and prints a table.

Start with `train.py`. `common.py` has the arguments, `--help` and exit statuses of all commands.
"""
