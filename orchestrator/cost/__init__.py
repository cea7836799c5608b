"""Estimates of the time, memory and disk of a run, before it starts.

Start with `estimate.dry_run`.

- `estimate`: `show` prints the dry run; lines that compare an estimate with the result
- `forecast`: the estimate that a run prints at its start, or after its first steps
- `tokens`: `TokenCounts`, the size of a dataset
- `timing`: `Timing`, measured seconds of a step, an evaluation …; `expected`, the estimate of a run
- `measure`: `measure` times some seconds of training; `process` starts `bench`, which trains
- `cache`: timings of earlier measurements
- `correct`: the expected time again, after the first steps and the first minute
"""
