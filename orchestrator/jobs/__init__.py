"""The two jobs: train one run, or run a sweep.

`job.Job` is what both do from the lock to the exit status; start reading there. `train.TrainJob`
and `sweep.SweepJob` fill in what differs.
"""
