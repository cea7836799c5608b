"""The Ray cluster: join or start one, and choose the workers of a run.

Start with `layout.resolve_layout`.

- `calls`: `interruptibly`, a call of Ray that a signal interrupts
- `connection`: `connect`, join a cluster or start one on this machine
- `device`: `of_workers`, the model of their device and its fast type
- `dtypes`: `suitable`, what `train.dtype=auto` stands for
- `gauges`: `show`, the progress as metrics of Ray
- `layout`: `find_layout`, `Layout`
- `lookout`: `Lookout`, says what a preparation waits for
- `nodes`: `check_nodes`, whether each node shares the storage and has the same software
- `room`: `Room`, the number of workers of each start, and what is printed without room for them
- `reach`: `Reach`, finds nodes that do not answer
- `private`: calls of private functions of Ray and torch
- `train_here.fit_here`: Ray Train with its controller in this process
"""
