"""A copy of runs, sweeps and datasets in object storage, which grows while they go on.

Start with `session.mirrored`, which a job enters. In the bucket, a run or dataset is
`<mirror>/<folder>/`: `mirror.json` names every object of the copy, and is written last.

- `manifest`: `Manifest`, the content of mirror.json; objects are never overwritten
- `committed`: the files of a folder that are complete
- `upload`: `Uploader`, a thread that copies them
- `dataset`: `upload_dataset`, which copies a dataset
- `download`: `pull`, which makes the folder again
- `lock`: `held`, one writer at a time, on any machine
- `state`: `State`, what a folder knows of its copy
- `session`: what a job does at its start and end
- `remote`: `here`, a local copy of the run that an address names
"""
