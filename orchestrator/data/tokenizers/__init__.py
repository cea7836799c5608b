"""The kinds of tokenizers. `base.py` is what all have, `plain.py` encodes bytes or characters,
`pairs.py` byte pairs: with ranks of tiktoken, or trained by `merges.py` on a corpus. `learn.py`
builds those that need a corpus, `encoder.py` encodes faster. `data/tokenizer.py` has their table.
"""
