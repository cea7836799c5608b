"""Which trials a sweep has: reads a sweep's file, checks it, and makes one experiment per trial.

- `expand`: `load_sweep` reads a file, `expand` makes its trials. Start here.
- `auto`: what `auto` stands for in a trial.
- `checks`: mistakes in a `sweep:` section. `trial_checks`: mistakes of all trials together.
- `dimensions`: one dimension of `sweep.space`, and random draws from it.
- `names`: names of trials.
- `sampler`: asks optuna for trials. The only module that imports optuna.
"""
