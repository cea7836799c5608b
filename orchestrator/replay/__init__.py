"""Trains some steps of a run again and compares every bit with what the run stored.

Public names: `recorded.RecordedRun` reads the run, `replay.Replay` trains and compares, and
`report.ReplayResult` is the result.

Start reading at `replay.Replay`. `compare` compares journal lines and tensors.
"""
