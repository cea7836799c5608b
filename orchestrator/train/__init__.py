"""Training of a run, or of a stage of a sweep. Imports neither Ray nor MLflow.

Start with `loop.Trainer.run`, the training loop. The main names are:

- `loop.train`, `loop.Trainer`: train to the last step, from the newest checkpoint if there is one.
- `step.Step`, `gradients.Gradients`: one optimizer step; same bits for any number of ranks.
- `state.TrainState`: what a checkpoint holds. `begin.begin` restores it or builds a new one, with
  the weights that `init_from` finds.
- `due`: when a line, an evaluation or a checkpoint is required; a run whose end moves.
- `evaluate`, `meter`, `nonfinite`, `checkpointer`: evaluations, log lines, steps that are not
  finite, checkpoints in the background.
- `numerics`: settings of the process that decide the last bit, and their fingerprint.
- `rates`: learning rates of a trial in a sweep.
- `trained`, `inspect`: a trained model for sampling and evaluation; a close look at one batch.
"""
