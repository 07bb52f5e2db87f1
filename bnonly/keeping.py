"A frozen model in fastai's Learner."
from fastai.callback.core import Callback

__all__ = ["KeepFrozen"]


class KeepFrozen(Callback):
    """Keep a model frozen through a Learner's fits, whatever asks for gradients in between or within.

    It sees every step before mixed precision looks at the gradients."""
    order = 5
    def __init__(self, needs: dict,   # parameter to whether it trains
                 keep):               # function of `needs` that sees to it
        self.needs, self.keep = needs, keep

    def before_fit(self): self.keep(self.needs)
    def before_step(self): self.keep(self.needs)
