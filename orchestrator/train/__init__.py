"""Training of a run, or of a stage of a sweep. Imports neither Ray nor MLflow.

Start with `loop.Trainer.run`, the training loop. The main names are:

- `loop.train`, `loop.Trainer`: train to the last step, from the newest checkpoint if there is one.
- `step.Step`, `gradients.Gradients`: one optimizer step, with the same bits for any number of
  ranks; `ranks` adds the gradients of all ranks.
- `state.TrainState`: what a checkpoint holds. `begin.begin` restores it or builds a new one, with
  the weights that `init_from` finds.
- `due`: when a journal line, an evaluation or a checkpoint is required.
- `evaluate`, `meter`, `nonfinite`, `checkpointer`: evaluations, log lines, losses that are not
  finite, checkpoints in the background.
- `numerics`: settings of the process that decide the last bit, and their fingerprint.
- `find`, `trained`: find and load a trained model for sampling and evaluation.
- `inspect`: shows one batch, and what a new model predicts for it.
"""
