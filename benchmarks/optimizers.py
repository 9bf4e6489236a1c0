"""The optimizers of the comparison: what is not said here is the default of the package they are from."""

import contextlib
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.extend
import jax.numpy as jnp
import optax

import mfac_jax
from benchmarks import ideas, rivals
from benchmarks.storages import ALL
from examples.common.optimizers import NeedsFactors
from examples.common.training import Step, TrainState, first_state, train_step
from examples.common.workload import Workload

MFAC_RATE = inspect.signature(mfac_jax.mfac).parameters["learning_rate"].default  # its untuned rate
PUBLISHED = inspect.signature(mfac_jax.mfac_published).parameters
PUBLISHED_RATE, PUBLISHED_NUM_GRADS = (PUBLISHED[name].default for name in ("learning_rate", "num_grads"))
TUNING_SEED = 0  # of the runs that choose a rate; the report is on others
# Peak rates tried, for each family of problems; "all" where one grid serves all of them.
ADAM_RATES = {
    "digits": (0.02, 0.05, 0.1, 0.2, 0.5),
    "finetune": (1e-4, 3e-4, 1e-3),
    "all": (0.001, 0.002, 0.005, 0.01, 0.02),
}
MUON_RATES = {
    "digits": (0.01, 0.02, 0.05, 0.1, 0.2),
    "finetune": (1e-3, 3e-3, 1e-2),
    "all": (0.005, 0.01, 0.02, 0.05, 0.1),
}
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "sgd": {
        "digits": (0.05, 0.1, 0.2, 0.5, 1.0),
        "noisy": (0.005, 0.01, 0.02, 0.05, 0.1),
        "finetune": (0.01, 0.03, 0.1),
        "all": (0.02, 0.05, 0.1, 0.2, 0.5),
    },
    "adamw": ADAM_RATES,
    "nadamw": ADAM_RATES,
    "muon": MUON_RATES,
    "kfac": {"all": (0.003, 0.01, 0.03, 0.1, 0.3)},
    "normuon": MUON_RATES,
    "soap": {
        "digits": (0.01, 0.03, 0.1, 0.3, 1.0),
        "finetune": (1e-4, 3e-4, 1e-3),
        "all": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    },
    "kron": {
        "digits": (0.003, 0.01, 0.03, 0.1, 0.3),
        "finetune": (1e-4, 3e-4, 1e-3),
        "all": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    },
    # Untuned, as their authors offer them.
    "prodigy": {"all": (1.0,)},
    "dadapt-adamw": {"all": (1.0,)},
    "schedule-free-adamw": {"all": (0.0025,)},
    "dog": {"all": (1.0,)},
    "mfac-published": {"all": (PUBLISHED_RATE,)},
    "mfac-published-tuned": {"all": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2)},
    "mfac-default": {"all": (MFAC_RATE,)},
    "mfac-metric": {"all": (MFAC_RATE,)},
    "mfac": {"finetune": (3e-4, 1e-3, 3e-3), "all": (0.001, 0.003, 0.01, 0.03, 0.1)},
}
# --grid: more rates, over three decades and a half; M-FAC at each damping.
GRID_RATES = {
    "mfac": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "adamw": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
}
GRID_DAMPINGS = (0.04, 0.2, 1.0, 5.0)
# --variants: what each setting of M-FAC's default earns, at a few rates, or at its own where a run takes
# minutes; seed 0.
VARIANT_RATES = {"digits": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), "all": (MFAC_RATE,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "mfac": {},
    "mfac, step_adaptation=0": {"step_adaptation": 0.0},
    "mfac, metric='diagonal', damping=0.2": {"metric": "diagonal", "damping": 0.2},
    "mfac, metric='identity'": {"metric": "identity"},
    "mfac, momentum=None": {"momentum": None},
    "mfac, weight_decay=0.1": {"weight_decay": 0.1},
    "mfac, blocks='leaf'": {"blocks": "leaf"},
    "mfac, damping=0.2": {"damping": 0.2},
    "mfac, damping=5": {"damping": 5.0},
    "mfac, num_grads=1": {"num_grads": 1},
    "mfac, num_grads=16": {"num_grads": 16},
    "mfac, num_grads=64": {"num_grads": 64},
    "mfac, storage=float32": {"storage": jnp.float32},
    "mfac, num_grads=128": {"num_grads": 128},
    "mfac, num_grads=256": {"num_grads": 256},
}

# storage_frontier: windows of several sizes and storages, each metric at its own rate and damping.
FRONTIER_NUM_GRADS = (4, 8, 16, 32, 64)
FRONTIER_RATES = {"rotated": MFAC_RATE, "diagonal": 3e-3}
FRONTIER_DAMPINGS = {"rotated": 1.0, "diagonal": 0.2}


def frontier_name(metric: str, num_grads: int, storage: str) -> str:
    """What such a window is called in the results."""
    return f"mfac, {metric}, {storage}, num_grads={num_grads}"


def frontier_line(name: str) -> str:
    """The name without the size."""
    return name.removeprefix("mfac, ").rpartition(",")[0]


FRONTIER: dict[str, dict[str, Any]] = {
    frontier_name(metric, num_grads, storage): {
        "metric": metric,
        "damping": FRONTIER_DAMPINGS[metric],
        "num_grads": num_grads,
        "storage": dtype,
    }
    for metric in FRONTIER_RATES
    for num_grads in FRONTIER_NUM_GRADS
    for storage, dtype in ALL.items()
}


def rates(grids: Mapping[str, tuple[float, ...]], problem: str) -> tuple[float, ...]:
    """Choose the grid of the problem's family."""
    return grids.get(problem.split("-")[0]) or grids["all"]


# From a schedule, and a damping where that is swept, to a transform. K-FAC has its own steps below.
IDEAS = {f"mfac, {name}": transform for name, transform in ideas.IDEAS.items()}
TRANSFORMS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": functools.partial(optax.sgd, momentum=0.9, nesterov=True),
    "adam": optax.adam,
    "adamw": optax.adamw,
    **rivals.TRANSFORMS,
    "mfac-published": mfac_jax.mfac_published,
    "mfac-published-tuned": mfac_jax.mfac_published,
    "mfac-default": mfac_jax.mfac,
    # So large a damping hides the window: metric, momentum and step factor are left.
    "mfac-metric": functools.partial(mfac_jax.mfac, damping=1000.0),
    "cgfac": mfac_jax.cgfac,
    **{
        name: functools.partial(mfac_jax.mfac, **options) for name, options in (VARIANTS | FRONTIER).items()
    },
    **IDEAS,
}
# Where an optimizer is left out, and why.
UNSUPPORTED = {
    **dict.fromkeys(
        [("kfac", problem) for problem in ("cifar10", "cifar10-10", "cifar10-30")],
        "kfac-jax 0.0.8 was measured at seconds a step on a ResNet of half the width (CPU)",
    ),
    **dict.fromkeys(
        [("kfac", problem) for problem in ("autoencoder", "poisson", "least-squares")],
        "only the cross-entropy is registered with kfac-jax here",
    ),
}
PACKAGES = {"kfac": "kfac_jax", "kron": "psgd_jax"}  # of optimizers that users install themselves


def why_missing(optimizer: str) -> str | None:
    """Why the optimizer's package cannot be used; None if it can."""
    try:
        rivals.import_package(PACKAGES.get(optimizer, "optax"))
    except Exception as error:  # a package made for another JAX may raise anything
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def make_transform(optimizer: str, steps: int, sweeps_damping: bool) -> optax.GradientTransformation:
    """Make an optimizer with peak rate and damping in its state: one compilation serves a grid."""
    shape = rivals.schedule(optimizer, steps)

    def make(peak_rate, swept_damping=None):
        options = {} if swept_damping is None else {"damping": swept_damping}
        return TRANSFORMS[optimizer](lambda step: peak_rate * shape(step), **options)

    hyperparameters = {"peak_rate": 1.0} | ({"swept_damping": 1.0} if sweeps_damping else {})
    tx = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(**hyperparameters)
    return NeedsFactors(*tx) if optimizer == "cgfac" else tx


REFRESHING = 50  # batches that bring batch statistics up to date
Start = tuple[TrainState, Step]  # a run's first state, and its compiled step
_compiled = {}  # (loss, transform) -> compiled `train_step`, in this process


def start(workload: Workload, optimizer: str, rate: float, damping: float | None, seed: int) -> Start:
    """Make the run's first state and its compiled step."""
    if optimizer == "kfac":
        return _start_kfac(workload, rate, seed)
    tx = make_transform(optimizer, len(workload.batches), damping is not None)
    swept = {} if damping is None else {"swept_damping": jnp.float32(damping)}
    state = first_state(workload, tx)
    opt_state = optax.tree.set(state.opt_state, peak_rate=jnp.float32(rate), **swept)
    # Copied: some keep the first parameters, and what is donated may not be there twice.
    state = state._replace(opt_state=jax.tree.map(jnp.copy, opt_state))
    state = jax.device_put(state, jax.devices()[0])
    data, key, program = workload.data, jax.random.key(seed), (workload.loss, tx)
    if program not in _compiled:
        lowered = train_step.lower(*program, state, data, workload.batches[0], key)
        _compiled[program] = lowered.compile()
    step = _compiled[program]
    return state, lambda state, indices: step(state, data, indices, key)


@functools.partial(jax.jit, static_argnames="loss")
def _statistics(loss, params, model_state, data, indices):
    return loss(params, model_state, data, indices, jax.random.key(0))[1]


def evaluated(workload: Workload, optimizer: str, state: TrainState) -> tuple[Any, Any]:
    """Return what to evaluate: parameters and model state, the newest ones for most optimizers.

    Averages of parameters have not seen any batch: batch statistics are brought up to date for them.
    """
    if optimizer not in rivals.EVALUATED:
        return state.params, state.model_state
    params, model_state = rivals.EVALUATED[optimizer](state.opt_state, state.params), state.model_state
    if jax.tree.leaves(model_state):
        for indices in workload.batches[:REFRESHING]:
            model_state = _statistics(workload.loss, params, model_state, workload.data, indices)
    return params, model_state


# ------------------------------------------------------------------------------------------------- K-FAC

# kfac-jax has no default for these. Of its two kinds of damping, the constant one is what its authors found
# to work for convolutional networks and transformers; at 1e-3, rates from 0.03 diverged on digits.
KFAC = {"momentum": 0.9, "damping": 1e-2}


@contextlib.contextmanager
def _registered_losses(kfac_jax) -> Iterator[None]:
    """Inside, the cross-entropy of optax tells kfac-jax its logits, as K-FAC needs."""
    plain = optax.softmax_cross_entropy_with_integer_labels

    def registering(logits, labels):
        kfac_jax.register_softmax_cross_entropy_loss(logits, labels, weight=len(labels) / labels.size)
        return plain(logits, labels)

    with mock.patch.object(optax, "softmax_cross_entropy_with_integer_labels", registering):
        yield


def _evaluate_equation(equation, inputs):
    """kfac_jax 0.0.8 unpacks `get_bind_params` into two; from JAX 0.10 on it returns one dictionary."""
    with jax.extend.source_info_util.user_context(equation.source_info.traceback):
        parameters = equation.primitive.get_bind_params(equation.params)
        output = equation.primitive.bind(*inputs, **parameters)
    return output if equation.primitive.multiple_results else [output]


@functools.cache
def _kfac(loss: Callable):
    """The optimizer of kfac_jax for a loss of the examples, `(params, model_state, data, indices, key)`."""
    kfac_jax = importlib.import_module("kfac_jax")
    matcher: Any = importlib.import_module("kfac_jax._src.tag_graph_matcher")
    matcher.eval_jaxpr_eqn = _evaluate_equation

    def registered_loss(params, model_state, key, batch):
        with _registered_losses(kfac_jax):
            return loss(params, model_state, *batch, key)

    return kfac_jax.Optimizer(
        jax.value_and_grad(registered_loss, has_aux=True),
        l2_reg=0.0,
        value_func_has_state=True,
        value_func_has_rng=True,
        num_burnin_steps=0,  # the others have no extra batches
        batch_size_extractor=lambda batch: len(batch[1]),
    )


def _start_kfac(workload: Workload, rate: float, seed: int) -> Start:
    """As `start`; a first step, thrown away, compiles."""
    optimizer, key = _kfac(workload.loss), jax.random.key(seed)
    peak = rivals.schedule("kfac", len(workload.batches))
    settings = {name: jnp.float32(value) for name, value in KFAC.items()}

    def step(state, indices):
        params, opt_state, model_state, stats = optimizer.step(
            state.params,
            state.opt_state,
            jax.random.fold_in(key, state.step),
            batch=(workload.data, indices),
            func_state=state.model_state,
            learning_rate=jnp.float32(rate) * peak(state.step),
            **settings,
        )
        return TrainState(state.step + 1, params, model_state, opt_state), stats["loss"]

    def fresh():
        params, model_state = jax.tree.map(jnp.copy, (workload.params, workload.model_state))
        opt_state = optimizer.init(params, key, (workload.data, workload.batches[0]), model_state)
        return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state)

    jax.block_until_ready(step(fresh(), workload.batches[0])[1])
    return fresh(), step
