"""Facts that each checkpoint's manifest needs, for tests in which their values do not matter."""

FACTS = {"fingerprints": {"data": "d", "numerics": {"cpus_per_worker": 1, "device": "cpu"}}}
