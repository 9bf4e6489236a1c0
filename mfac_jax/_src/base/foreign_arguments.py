"""Arguments that other optimizers have: an error says what takes their place."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

Args = ParamSpec("Args")
Result = TypeVar("Result")

# Arguments of optax.adamw and of the PyTorch code of M-FAC, and what may take their place.
_COUNTERPARTS = {
    "b1": ("momentum", "window_momentum"),
    "damp": ("damping",),
    "eps": ("damping",),
    "eps_root": ("damping",),
    "lr": ("learning_rate",),
    "mu_dtype": ("storage",),
    "ngrads": ("num_grads",),
    "weight_decay_mask": ("mask",),
    "weightdecay": ("weight_decay",),
    "window_size": ("num_grads", "num_batches"),
}


def explain_foreign_arguments(**reasons: str) -> Callable[[Callable[Args, Result]], Callable[Args, Result]]:
    """Decorate a function: arguments of other optimizers are refused with the argument to pass instead.

    `reasons` are said of those that have no counterpart. All other names are left to Python.
    """

    def decorate(make: Callable[Args, Result]) -> Callable[Args, Result]:
        own = inspect.signature(make).parameters
        explained = reasons | {
            name: f"Its counterpart is {counterpart} (default: {own[counterpart].default!r})."
            for name, counterparts in _COUNTERPARTS.items()
            for counterpart in counterparts
            if counterpart in own
        }

        @functools.wraps(make)
        def made(*args: Args.args, **kwargs: Args.kwargs) -> Result:
            for name in kwargs:
                if name in explained:
                    raise TypeError(f"{made.__name__} has no argument {name!r}. {explained[name]}")
            return make(*args, **kwargs)

        return made

    return decorate
