"""The processes that train the stages of a sweep, on any machine.

Start with `trainable.StageTrainable`. A machine that does not share the folder of the sweep, which
is in a bucket, trains a stage in a folder of its own. The folder on the machine of the command
stays the truth: it is what the mirror copies, and what the next start continues. What the other
machine has not sent when it is lost is trained again.

- `trainable`: `StageTrainable`, what Ray Tune runs; `environment`: variables that Tune reads
- `place`: `Place`, where a process trains its stages: in the folder of the sweep
- `away`: `Away`, the same on a machine without it, which sends each file that is complete
- `desk`: `Desk`, a process on the machine of the command, which gives out and takes these files
"""
