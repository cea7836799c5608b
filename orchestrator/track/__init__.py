"""Shows runs and sweeps in MLflow.

Training writes only to the run folder. A thread of the driver reads this folder and sends what
MLflow does not have, so training never waits for a server. tracking.json stores what was sent.

Public names: `tracker.Tracker` sends while a run or a sweep goes on, and `tracker.resend_metrics`
sends later what the server did not receive. `server.resolve_uri` finds the server.

Start reading at `mlflow.Projection.send`; `sweep` sends a sweep and its trials.
`outbox.MetricQueue` decides which values are sent, and `sender.Sender` retries, unless `answers`
tells that this cannot help. `mlflow_run` finds or creates the MLflow run, `contents` converts the
content of a run folder, `attachments` sends its files, `checkpoints` registers its checkpoints, and
`exported` a model that `pipelines/export.py` wrote.
"""
