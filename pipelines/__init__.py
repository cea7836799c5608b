"""Commands. Each reads its arguments, makes one call and prints a table.

Start with `train.py`. `starting.py` is imported first, for Ctrl-C. `common.py` has the exit
statuses of all commands, and the arguments and `--help` of those that take an experiment;
`options.py` has the options of the others.
"""
