"""The Ray cluster: join or start one, and choose the workers of a run.

Start with `layout.resolve_layout`.

- `calls`: `interruptibly`, a call of Ray that a signal interrupts
- `connection`: `connect`, join a cluster or start one on this machine
- `device`: `of_workers`, the model of their device and its fast type
- `dtypes`: `suitable`, what `train.dtype=auto` stands for
- `layout`: `find_layout`, `Layout`
- `private`: calls of private functions of Ray and torch
- `train_here.fit_here`: Ray Train with its controller in this process
"""
