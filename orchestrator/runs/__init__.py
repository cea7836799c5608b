"""The folder of a run: its files, its locks, and how the run started and ended.

Start with `folder.RunFolder`, which lists all files. The main names are:

- `folder.RunFolder`, `SweepFolder`: file names, and how each file is read and written.
- `storage.run_folder`: where the folder of an experiment is.
- `identity.check_resumable`, `begin_attempt`: whether an experiment may continue there; run.json.
- `ending.Ending`: how a run, a stage or a sweep ended. `summary.summarize` writes summary.json.
- `journal.Journal`, `read`, `Tail`: one line of metrics per logged step; `metrics.METRICS` is the
  table of metrics.
- `journal_copy.restore`: lines that were lost come back from a checkpoint.
- `events.note`: events such as a hang or a damaged checkpoint.
- `lock.held`: locks of the driver, of rank 0 and of the sender to MLflow.
- `signals`, `stop.request`: SIGTERM, Ctrl-C and the request to stop.
- `console.Console`: prints lines and events while the run trains.
- `facts.facts_of`, `sources.source_facts`: parameters and tags for MLflow; the code that runs.
"""
