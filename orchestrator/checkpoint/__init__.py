"""Checkpoints on disk: written completely or not at all, verified before they are read, no pickle.

Start with `format`, which shows what is in the folder of a checkpoint. The main names are:

- `store.commit`: write a checkpoint. `store.latest_valid`: find one. `store.prune`: remove others.
- `format.verify`: compare every byte with the hashes in the manifest.
- `store.Content`: read its files. `store.load_tensors` reads all formats.
- `tensor_file`: safetensors files as buffers in memory, with whole tensors or slices.
- `tensor_read`: their tensors, and the hash of weights.
- `folders`: rename and remove checkpoints so that a kill leaves them complete.
"""
