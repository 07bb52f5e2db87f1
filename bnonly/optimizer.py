"The paper's optimizer for fastai's Learner: SGD in one kernel, without PyTorch's compiler."
import torch
from fastai.optimizer import Optimizer
from fastcore.foundation import L
from torch.optim.sgd import sgd

__all__ = ["SGD"]


class SGD(Optimizer):
    """SGD with momentum and coupled decay: the function that `torch.optim.SGD` calls too, so the same numbers.

    The class `torch.optim.SGD` imports PyTorch's compiler before its first step, which takes three seconds and is never
    used here."""
    def __init__(self, params: list,   # or groups of them: dicts with params, and rate or weight_decay of their own
                 lr: float, momentum: float, weight_decay: float):
        groups = params if isinstance(params[0], dict) else [dict(params=params)]
        super().__init__([L(g["params"]) for g in groups], [], lr=lr, mom=momentum, wd=weight_decay)
        for hyper, group in zip(self.hypers, groups):
            hyper |= {dict(weight_decay="wd").get(k, k): v for k, v in group.items() if k != "params"}

    @torch.no_grad()
    def step(self, closure=None):
        "Move every parameter that has a gradient; its momentum is kept as `state[p]['momentum_buffer']`."
        if closure is not None: raise NotImplementedError("fastai's optimizers take no closure")
        for params, hyper in zip(self.param_lists, self.hypers):
            params = [p for p in params if p.grad is not None]
            momenta = [self.state[p].get("momentum_buffer") for p in params] if hyper["mom"] else []
            sgd(params, [p.grad for p in params], momenta, fused=True, lr=hyper["lr"], momentum=hyper["mom"],
                weight_decay=hyper["wd"], dampening=0, nesterov=False, maximize=False)
            for p, m in zip(params, momenta): self.state[p]["momentum_buffer"] = m

    def zero_grad(self):
        "Forget the gradients, as PyTorch's optimizers do."
        for params in self.param_lists:
            for p in params: p.grad = None
