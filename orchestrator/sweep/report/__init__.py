"""What a sweep shows to people: its plan, its progress and its results.

Start reading at `files.Report`, which writes the files of a sweep while it runs. `ranking` compares
the trials, `summary` ends a sweep on the terminal, `figures` draws, `view` prints the tree of
stages, and `table` shows the progress.
"""
