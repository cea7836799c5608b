"""The Ray cluster: joining or starting one, and which workers a run gets on it.

    layout.py    `connect`, `find_layout`, `Layout`
    local.py     `start`: a cluster on this machine for one driver
    private.py   private functions of Ray and torch, in one place

Start with `layout.resolve_layout`.
"""
