"""What a run costs, known before it starts.

    estimate.py   `show`: the dry run of a run; the lines that compare estimate and result
    timing.py     `Timing` of steps, evaluations and checkpoints; `expected`: what a run then takes
    measure.py    `measure`: time some seconds of training on this machine
    cache.py      timings of earlier measurements

Start with `estimate.dry_run`.
"""
