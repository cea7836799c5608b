"""From a corpus to a trained, tracked GPT.

Imports run downward: `pipelines` uses `orchestrator`, which uses `model`. Start with
`train/loop.py` for the training loop, or with `jobs/train.py` for the life of a run.

- `config`: all settings of a run or a sweep
- `cluster`: Ray's nodes, and how many workers run where
- `objects`: object storage, such as S3
- `data`: corpus to token shards; batches
- `checkpoint`: checkpoint folders
- `runs`: the folder of a run and its files
- `mirror`: a copy of runs in object storage
- `train`: the training loop, without Ray
- `track`: MLflow
- `cost`: estimates before a run
- `workers`: training processes on Ray; hangs and out of memory
- `sweep`: many trials that share steps
- `replay`: repeat a part of a run and compare bits
- `jobs`: the life cycle of a run and of a sweep
- `code_hashes`: hashes of the modules that decide the bits of a result
- `own_code`, `own_files`, `own_checks`, `own_optimizer`: models and optimizers of the user
- `errors`, `files`, `folders`, `hashes`, `lines`, `machine`, `paths`, `redact`, `text`: used by all
  packages
"""
