"""A log of diagnostics for training loops."""

import logging
import operator
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import optax

from mfac_jax._src.base import checks
from mfac_jax._src.mfac.diagnostics import diagnostics

_logger = logging.getLogger("mfac_jax")


class DiagnosticsLog:
    """A callback for a training loop: keeps and logs the diagnostics of every so many steps.

    A call logs one line to the logger `"mfac_jax"` at level INFO, which Python shows after
    `logging.basicConfig()` and `logging.getLogger("mfac_jax").setLevel(logging.INFO)`. Of several blocks
    it has the median and the range.

    Attributes:
      every: calls at other steps than the multiples of this do nothing.
      records: a dict per step, with `step` and the fields of `Diagnostics` as numbers and lists. To resume
        a run, keep them with `json` and pass them as `records`; a step that comes again replaces its
        record, and those after it.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> tx = mfac_jax.mfac(learning_rate=0.1, num_grads=4)
      >>> state = tx.init(jnp.zeros(2))
      >>> log = mfac_jax.DiagnosticsLog(every=10)
      >>> for step in range(30):
      ...   _, state = tx.update(jnp.array([1.0, step]), state)
      ...   log(step, state)
      >>> [record['step'] for record in log.records]
      [0, 10, 20]
    """

    def __init__(self, every: int = 10, records: Iterable[dict[str, Any]] = ()):
        """Check `every`, any integer >= 1, and copy `records`, those of an earlier log."""
        self.every = checks.check_count("every", every, "10")
        self.records = list(records)

    def __call__(self, step: int | jax.Array, opt_state: optax.OptState) -> None:
        """Record and log a state, if the step is a multiple of `every`; errors as `diagnostics`."""
        step = operator.index(step)
        if step % self.every:
            return
        measured = jax.device_get(diagnostics(opt_state))._asdict()
        record = {"step": step} | {name: np.asarray(x).tolist() for name, x in measured.items()}
        self.records = [old for old in self.records if old["step"] < step] + [record]
        _logger.info("%s", _line(record))


def _line(record: dict[str, Any]) -> str:
    """A record for reading."""

    def show(name: str) -> str:
        x = np.asarray(record[name])
        text = f"{np.median(x):.3g}"
        return text if x.size == 1 else f"{text} ({x.min():.3g} to {x.max():.3g})"

    return (
        f"step {record['step']}: effective rank {show('effective_rank')} of {record['rows_used']}, "
        f"condition number {show('condition_number')}, damping share {show('damping_share')}, "
        f"similarity {show('similarity')}, alignment {show('alignment')}, "
        f"gradient norm {show('gradient_norm')}, step norm {show('step_norm')}, "
        f"mean cosine {show('mean_cosine')}, step factor {show('step_factor')}, "
        f"rejected {record['grads_rejected']}"
    )
