"""Work that the ranks of a run share.

- `slots` deals out the slots of a step, and counts the vectors that a rank needs to add them.
- `exchange.Exchange` adds vectors over all ranks.
- `layout.Layout` places all parameters in flat vectors; `shards.Shard` is the part of them that a
  rank updates; `regions` has the sizes of both. `overlap.Overlap` exchanges the gradients of a
  shard during the last backward pass.
- `writing`, `reading`: a checkpoint of which each rank writes or reads a part.
"""
