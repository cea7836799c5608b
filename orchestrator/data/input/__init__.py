"""The files of a corpus before they are read: `paths.py` finds them, `kinds.py` tells text, JSON
lines, Parquet and other files apart, `download.py` gets files from an address, `objects.py` those
of a bucket, and `cuts.py` finds the places where a text may be cut.
"""
