"""The mathematics of a GPT. Needs torch and the standard library; no files, no network.

Start with `gpt.py`.

- `gpt`: the model, `GPT(GPTConfig(…))`; `gpt_config`: its shape, without torch
- `optim`, `schedule`, `models`: tables of optimizers, learning-rate schedules and models
- `generate`: sampling from a model
- `weights`: state dicts of Hugging Face and nanoGPT
- `flops`: parameters, FLOPs and MFU
"""
