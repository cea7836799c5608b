"""The two jobs: train one run, or run a sweep.

Public names: `train.run` and `sweep.run` do a job and return the exit status of the driver.

Start reading at `job.Job.run`, the steps of both jobs. `train.TrainJob` and `sweep.SweepJob`
implement the steps that differ. `restart` starts the command again if its own Ray has died.
`alerts` sends how a job ended to a webhook; `show` prints how a run ended.
"""
