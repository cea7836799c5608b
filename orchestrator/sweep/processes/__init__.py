"""The processes that train the stages of a sweep, on any machine.

Start with `trainable.StageTrainable`. With `storage=s3://…`, only the machine of the command has
the folder of the sweep. A stage on another machine trains in a folder of its own, and sends its
files to the folder of the sweep. Only the latter is copied to the mirror, and continued at the next
start. If the other machine is lost, the steps after the last checkpoint that it sent are trained
again.

- `trainable`: `StageTrainable`, what Ray Tune runs; `environment`: variables that Tune reads
- `place`: `Place`, where a process trains its stages: in the folder of the sweep
- `away`: `Away`, a place on a machine without this folder; it sends each complete file to the desk
- `desk`: `Desk`, a process on the machine of the command; it sends and receives files of stages
"""
