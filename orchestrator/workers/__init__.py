"""Worker processes: starting them on Ray, watching them, and finding out why they ended.

    ray_train.py   `fit`: train one run on Ray Train; dead workers are started again
    worker.py      `work`: what every worker process of a run does
    places.py      `find`: where a worker has the run and its tokens
    attempts.py    starts of the workers and their failures, in files of the run folder
    process_group.py  the process group that the workers form
    crew.py        `Crew`: the workers of a stage of a sweep
    watchdog.py    `Watchdog`: each rank reports its phase and is ended if it hangs
    profiler.py    `Profiler`: a trace of some steps, and their largest costs
    watch.py       `Watch`, `RunWatch`: what the driver looks for while the workers train
    same_error.py  `SameErrorLimit`: ends a run that fails again and again in the same way
    diagnose.py    `diagnose`: how a run or a stage ended; `advise`: which micro-batch fits
    marks.py       the current phase of each rank, on disk
    hangs.py       ends a stuck rank, keeps its thread stacks, names the rank that hung
    memory.py      free memory, and which processes the system killed for lack of it
    fitting.py     a micro-batch that fits

Start with `ray_train.fit`, then read `diagnose.diagnose`.
"""
