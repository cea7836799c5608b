"""A model of one layer on characters, which trains a step in milliseconds."""

TINY = [
    "data.tokenizer=char",
    "model.n_layer=1",
    "model.n_head=2",
    "model.n_embd=16",
    "model.block_size=16",
    "model.dropout=0.1",
    "model.pad_vocab_to=1",
    "train.dtype=float32",
    "train.micro_batch_size=2",
    "train.global_batch_size=8",
]
