"""What a sweep shows to its user: its tree, its progress and its results.

Start reading at `files.SweepFiles`, which writes the files of a sweep while it runs. `view` prints
the tree of stages and `figures` draws it, `advice` prints what would share more steps, and
`progress_lines` the progress, which `pace` follows. `comparison` writes the ranking as a table, and
`summary` prints the last lines on the terminal.
"""
