"""Object storage: buckets of S3, or of a store that has S3's interface.

- `address.Address`: `s3://bucket/key`, parsed and checked
- `store.Store`: what is asked of a store; `store.open_store` connects to one
- `s3.S3Store`: the only module that imports boto3
- `threads`: several requests at a time
- `cache`: copies of objects on this machine, bounded in size

A listing may be old or incomplete. It finds the objects of `data.corpus`, and what a killed process
has left in a mirror. What a mirror has is never read from one.
"""
