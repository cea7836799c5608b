"""`ray start` of a node whose workers are forked by `warm.py`: `warm_head.py start OPTION…`."""

import os
import subprocess
import sys

import warm

del sys.path[0]  # the folder of this file, whose modules have common names

from ray._private import ray_constants  # noqa: E402
from ray.scripts.scripts import main  # noqa: E402

if __name__ == "__main__":
    if "--head" in sys.argv:  # the other nodes use the same server
        subprocess.Popen([sys.executable, warm.__file__, "serve", os.environ[warm.SOCKET]])
    # Ray adds it to the folder of its own file; an absolute path replaces that folder.
    ray_constants.SETUP_WORKER_FILENAME = warm.__file__
    main()
