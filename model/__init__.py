"""Models and optimizers. Needs torch and the standard library; no files, no network.

Start with `gpt.py` or `modern.py`.

- `protocol`: what every model has, and what it may have
- `gpt`: GPT-2, `GPT(GPTConfig(…))`; `gpt_config`: its shape, without torch
- `modern`: rotary positions, RMSNorm, squared ReLU; `modern_config`: its settings, without torch
- `cache`: keys and values of earlier tokens; `loss`: cross entropy, also in chunks
- `operations`: normalization, rotation and squared ReLU, fast on a CPU
- `optim`, `schedule`, `models`: tables of optimizers, learning-rate schedules and models
- `muon`: Muon for matrices with AdamW for the rest, in one optimizer
- `generate`: sampling from a model
- `weights`: state dicts of Hugging Face and nanoGPT
- `flops`: parameters, FLOPs and MFU
"""
