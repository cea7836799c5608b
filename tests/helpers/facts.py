"""What every checkpoint's manifest says besides its parts, for tests that need no more of it than that it is there."""

FACTS = {"fingerprints": {"data": "d", "numerics": {"cpus_per_worker": 1, "device": "cpu"}}}
