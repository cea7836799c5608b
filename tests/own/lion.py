"""The optimizer Lion (arXiv:2302.06675): the sign of a mix of momentum and gradient."""

import torch


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum, gradient = state["momentum"], parameter.grad
                update = torch.lerp(gradient, momentum, beta1).sign_()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"])
                momentum.lerp_(gradient, 1 - beta2)


def lion(groups, settings):
    """Build Lion; `groups` and `settings` are described in `model/optim.py`."""
    return Lion(groups, {"lr": settings.max_lr})
