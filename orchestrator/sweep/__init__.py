"""A sweep: many trials, trained as a tree of stages so that no step runs twice.

Read in this order:

- `space`: reads a sweep's file and makes its trials.
- `trials`: `PlannedTrial`, a trial with the settings of its steps and its dataset.
- `branch`: `Branch`, a trial as the tree sees it.
- `tree`: `build_tree` finds the steps that trials share; each stage of the tree runs once.
- `states`: which stages of a tree can start, and which cannot run any more.
- `study`: `Study`, a sweep that is ready to run. It builds the tree and collects the results.
- `progress`: `Progress`, the state of a running sweep on disk.
- `tune`: `execute` runs the stages with Ray Tune.
- `processes`: what Ray Tune runs, also on machines that do not share the folder of the sweep.
- `stage`: `run_stage` trains one stage. `records` has its files stage.json and result.json.
- `stored`: which stages are on disk, from this tree or an earlier one.
- `ranking`: compares the trials. `outcome`: how a sweep ended.
- `source`: checks before a sweep starts, such as those of the run that it branches off.
- `probes`: short anneals that show which trials to stop.
- `cost`: `--dry-run`, and the estimate of time, memory and disk.
- `report`: the tables, the figure and the files for users and for MLflow.
"""
