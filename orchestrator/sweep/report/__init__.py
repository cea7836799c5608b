"""What a sweep shows to people: its tree, its progress and its results.

Start reading at `files.Report`, which writes the files of a sweep while it runs. `view` prints the
tree of stages, `advice` what would share more steps, and `table` the progress. `ranking` compares
the trials, `comparison` writes the result as a table, `figures` draws it, and `summary` writes the
last lines on the terminal.
"""
