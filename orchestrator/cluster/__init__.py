"""The Ray cluster: join or start one, and choose the workers of a run.

Start with `layout.resolve_layout`.

- `layout`: `connect`, `find_layout`, `Layout`
- `local`: `start`, a cluster on this machine for one driver
- `private`: calls of private functions of Ray and torch
"""
