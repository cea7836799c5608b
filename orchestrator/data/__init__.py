"""Makes token shards from a corpus, and batches from token shards.

Prepare: `prepare.prepare_in` makes the dataset of a `data` section, or finds it.
`prepared.dataset_dir` is its folder, `prepared.find_prepared` looks without preparing, and
`estimate.estimate_tokens` estimates its size. `corpus.py` and the package `input` find the files,
`documents.py` reads them, `split.py` tells train from val, `tokenizer.py` and the package
`tokenizers` encode them, `shards.py` is the format of the tokens. `tasks.py` and `parts.py` have
the tasks that `ray_tasks.py` runs.

Train: `dataset.load_manifest` reads a dataset. `batches.TokenStream`, `Batches` and `EvalBatches`
read its tokens, in the order of `order.py`; `batches.Prefetcher` reads ahead.
`index.documents_of` names the documents behind a window.

Start reading with `prepare.py`, then `batches.py`. To add a kind of file or of tokenizer, see
`documents.READERS` and `tokenizer.TOKENIZERS`.
"""
