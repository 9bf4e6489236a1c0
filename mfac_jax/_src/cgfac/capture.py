"""Inputs and output gradients of the layers of any model, found in the program of its loss.

A layer is a product of matrices, or a convolution, of something with a batch axis and a parameter. JAX
traces the loss to a list of operations; here that list is gone through once more, each layer's inputs are
kept, and a zero is added to what comes out: the gradient by it is the output gradient, and falls out of
the one backward pass. No model has to be changed for it, in linen, nnx or neither.
"""

import collections
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from mfac_jax._src.base import trees
from mfac_jax._src.cgfac.layers import LayerFactors


class _Use(NamedTuple):
    """One use of a kernel.

    Attributes:
      kernel: number of the parameter.
      inputs: `(N, ..., in)`.
      output: the type of what comes out.
      as_rows: from an array like what comes out to `(N, ..., out)`.
      has_outputs_last: whether the axes of the outputs are the last of what comes out, as a bias is added.
    """

    kernel: int
    inputs: jax.Array
    output: Any
    as_rows: Callable[[jax.Array], jax.Array]
    has_outputs_last: bool


class _Rows(NamedTuple):
    """Of one use of a kernel; `bias` is the number of the parameter that was added to its output."""

    kernel: int
    inputs: jax.Array  # (N, ..., in)
    output_grads: jax.Array  # (N, ..., out)
    bias: int | None


class _Origin(NamedTuple):
    """What a value was made from.

    Attributes:
      parameter: the number of the one that it is, entry by entry, or None.
      use: number of the use of a kernel that it is the output of, or None.
      has_all_axes: whether the parameter has its own axes; otherwise they are the last ones.
      is_data: whether anything but parameters went into it.
    """

    parameter: int | None = None
    use: int | None = None
    has_all_axes: bool = True
    is_data: bool = False


_DATA, _NUMBER = _Origin(is_data=True), _Origin()
_INLINED = ("jit", "remat2")
_SAME_AXES = ("convert_element_type", "copy", "sharding_constraint", "pvary", "reshard")


class _Interpreter:
    """Runs a program once, and notes the uses of kernels on the way.

    Attributes:
      perturbations: what to add to the output of each use; None for nothing.
      uses: found so far.
      bias_of_use: number of the parameter that was added to an output.
    """

    def __init__(self, perturbations: Sequence[jax.Array] | None):
        self.perturbations = perturbations
        self.uses: list[_Use] = []
        self.bias_of_use: dict[int, int] = {}

    def run(self, jaxpr, consts, values, origins) -> tuple[list[Any], list[_Origin]]:
        """The outputs and where they come from."""
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values], strict=True))
        known_origins = dict.fromkeys(jaxpr.constvars, _DATA)
        known_origins.update(zip(jaxpr.invars, origins, strict=True))
        atoms = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
        readers = collections.Counter(v for v in atoms if not isinstance(v, Literal))

        def read(atom):
            return atom.val if isinstance(atom, Literal) else known[atom]

        def origin_of(atom):
            if isinstance(atom, Literal):
                return _NUMBER
            origin = known_origins[atom]
            # What is read by another operation too has more than a bias added to it.
            return origin if readers[atom] == 1 else origin._replace(use=None)

        for eqn in jaxpr.eqns:
            inputs, froms = [read(v) for v in eqn.invars], [origin_of(v) for v in eqn.invars]
            with eqn.ctx.manager:
                outputs, origins = self._operation(eqn, inputs, froms)
            known.update(zip(eqn.outvars, outputs, strict=True))
            known_origins.update(zip(eqn.outvars, origins, strict=True))
        return [read(v) for v in jaxpr.outvars], [origin_of(v) for v in jaxpr.outvars]

    def _operation(self, eqn: JaxprEqn, inputs, origins) -> tuple[list[Any], list[_Origin]]:
        name = eqn.primitive.name
        if name in _INLINED:
            inner = eqn.params["jaxpr"]
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs, origins)
        outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
        outputs = list(outputs) if eqn.primitive.multiple_results else [outputs]
        find = {"dot_general": _use_in_product, "conv_general_dilated": _use_in_convolution}.get(name)
        use = find and find(eqn.params, inputs, origins, outputs[0])
        is_data = any(origin.is_data for origin in origins)
        if use:
            number = len(self.uses)
            self.uses.append(use)
            if self.perturbations is not None:
                outputs[0] = outputs[0] + self.perturbations[number]
            return outputs, [_Origin(use=number, is_data=True)]
        origin = self._origin_after(eqn, inputs, origins)._replace(is_data=is_data)
        return outputs, [origin] * len(outputs)

    def _origin_after(self, eqn: JaxprEqn, inputs, origins: Sequence[_Origin]) -> _Origin:
        name = eqn.primitive.name
        if name in _SAME_AXES:
            return origins[0]
        if name in ("reshape", "squeeze", "broadcast_in_dim") and _keeps_last_axes(eqn, inputs[0].shape):
            return origins[0]._replace(has_all_axes=False)
        if name == "add":
            for output, bias in (origins, origins[::-1]):
                if output.use is not None and bias.parameter is not None:
                    self.bias_of_use[output.use] = bias.parameter
        return _NUMBER


def _keeps_last_axes(eqn: JaxprEqn, shape: tuple[int, ...]) -> bool:
    """Whether the operation adds or drops leading axes alone."""
    core = shape[next((i for i, size in enumerate(shape) if size > 1), len(shape)) :]
    aval: Any = eqn.outvars[0].aval
    out = aval.shape
    is_last = out[len(out) - len(core) :] == core
    if eqn.primitive.name == "broadcast_in_dim":
        axes = eqn.params["broadcast_dimensions"][len(shape) - len(core) :]
        return is_last and axes == tuple(range(len(out) - len(core), len(out)))
    return is_last and math.prod(out) == math.prod(core)


def _is_kernel(origin: _Origin, value: jax.Array, other: _Origin) -> bool:
    """Whether the value is a parameter with its own axes, which meets more than parameters."""
    is_parameter = origin.parameter is not None and origin.has_all_axes
    return is_parameter and other.is_data and jnp.issubdtype(value.dtype, jnp.floating)


def _use_in_product(params, inputs, origins, output) -> _Use | None:
    """A product of matrices that sums over the kernel's leading axes; the other side has a batch axis."""
    (contracted, batch) = params["dimension_numbers"]
    side = next((i for i in (1, 0) if _is_kernel(origins[i], inputs[i], origins[1 - i])), None)
    if side is None or any(batch):
        return None
    x, of_kernel, of_x = inputs[1 - side], contracted[side], contracted[1 - side]
    order = sorted(range(len(of_kernel)), key=of_kernel.__getitem__)
    free = [axis for axis in range(x.ndim) if axis not in of_x]
    if not free or [of_kernel[i] for i in order] != list(range(len(of_kernel))):
        return None
    rows = jnp.transpose(x, (*free, *(of_x[i] for i in order)))
    rows = rows.reshape(*rows.shape[: len(free)], math.prod(rows.shape[len(free) :]))

    def as_rows(y):
        if side == 0:  # the kernel's axes come first
            y = jnp.moveaxis(y, range(y.ndim - len(free), y.ndim), range(len(free)))
        return y.reshape(*y.shape[: len(free)], math.prod(y.shape[len(free) :]))

    return _Use(origins[side].parameter, rows, jax.typeof(output), as_rows, side == 1)


def _use_in_convolution(params, inputs, origins, output) -> _Use | None:
    """A convolution with a kernel of axes (places..., in, out), in one group."""
    x, kernel = inputs
    (batch_axis, channel_axis, *places), of_kernel, of_output = params["dimension_numbers"]
    last = kernel.ndim - 1
    is_plain = of_kernel == (last, last - 1, *range(last - 1))
    groups = (params["feature_group_count"], params["batch_group_count"])
    if not _is_kernel(origins[1], kernel, origins[0]) or not is_plain or groups != (1, 1):
        return None
    patches = lax.conv_general_dilated_patches(
        jnp.transpose(x, (batch_axis, channel_axis, *places)),
        kernel.shape[:-2],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,
    )  # (N, in * entries of a patch, *places)
    n, _, *counts = patches.shape
    patches = patches.reshape(n, kernel.shape[-2], -1, *counts)
    patches = jnp.moveaxis(patches, (2, 1), (-2, -1)).reshape(n, *counts, -1)

    def as_rows(y):
        return jnp.transpose(y, (of_output[0], *of_output[2:], of_output[1]))

    return _Use(origins[1].parameter, patches, jax.typeof(output), as_rows, of_output[1] == last)


def value_and_grad_with_factors(
    loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any, dict[str, LayerFactors]]]:
    """As `jax.value_and_grad`, and the factors of K-FAC for each layer, from the same backward pass.

    A layer is a parameter that something with a batch axis is multiplied with, or convolved: Flax's
    `Dense`, `DenseGeneral`, `Conv`, `Linear`, or `x @ w`. Its bias is the parameter added to what comes
    out. The model is not changed, nor wrapped: layers are found in the program that JAX traces the loss to.
    The first axis of a layer's inputs is that of the examples, and the loss a mean over them.

    Not found are layers inside of loops (`jax.lax.scan`, `map`), of `jax.lax.cond` and of functions with
    rules of their own for derivatives, `jax.vmap` over kernels, grouped convolutions, kernels that are
    transposed or computed first, and what is no such product (embeddings, the scales of normalisations):
    `scale_by_cgfac` says what happens to their parameters. The keys of the factors say what was found. What
    `jax.checkpoint` would compute again in the backward pass is kept, as the factors are.

    The output gradients are those of the loss, so that F is the empirical Fisher matrix. With labels that
    are drawn from the model's own distribution it is the Fisher matrix: call the function a second time on
    a loss with such labels, and take the factors alone from there.

    Args:
      loss: from parameters, and anything else, to the mean loss; or to that and something more with
        `has_aux`.
      has_aux: as in `jax.value_and_grad`.

    Returns:
      A function with the arguments of `loss`, for use under `jax.jit`. It returns the value (with the rest,
      if `has_aux`), the gradient by the first argument, and a dict from the path of each kernel, as in
      'Dense_0/kernel', to its `LayerFactors`. A kernel that is used in several places has the rows of all.

    Raises:
      TypeError: a parameter is not a real floating-point array; the loss is not a real scalar.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> params = {'dense': {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}}
      >>> loss = lambda p, x: jnp.mean((x @ p['dense']['kernel'] + p['dense']['bias']) ** 2)
      >>> value, grads, factors = mfac_jax.value_and_grad_with_factors(loss)(params, jnp.ones((4, 3)))
      >>> layer = factors['dense/kernel']
      >>> layer.inputs.shape, layer.output_grads.shape, layer.bias
      ((4, 3), (4, 2), 'dense/bias')

    References:
      James Martens, Roger Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, ICML 2015.

      Roger Grosse, James Martens, `A Kronecker-factored approximate Fisher matrix for convolution layers
      <https://arxiv.org/abs/1602.01407>`_, ICML 2016.
    """

    @functools.wraps(loss)
    def wrapped(params, *args, **kwargs):
        trees.check_params(params)
        leaves, structure = jax.tree.flatten(params)
        closed, shape = jax.make_jaxpr(lambda p: loss(p, *args, **kwargs), return_shape=True)(params)
        origins = [_Origin(parameter=number) for number in range(len(leaves))]

        def run(leaves, interpreter):
            outputs, _ = interpreter.run(closed.jaxpr, closed.consts, leaves, origins)
            outputs = jax.tree.unflatten(jax.tree.structure(shape), outputs)
            value, aux = outputs if has_aux else (outputs, None)
            return value, (aux, [use.inputs for use in interpreter.uses])

        found = _Interpreter(None)
        jax.eval_shape(lambda leaves: run(leaves, found), leaves)
        zeros = [_zeros(use.output) for use in found.uses]
        evaluate = jax.value_and_grad(
            lambda leaves, zeros: run(leaves, _Interpreter(zeros)), argnums=(0, 1), has_aux=True
        )
        (value, (aux, inputs)), (grads, output_grads) = evaluate(leaves, zeros)
        rows = [
            _Rows(
                use.kernel,
                x,
                len(x) * use.as_rows(g),
                found.bias_of_use.get(number) if use.has_outputs_last else None,
            )
            for number, (use, x, g) in enumerate(zip(found.uses, inputs, output_grads, strict=True))
        ]
        factors = _of_kernels(rows, params)
        return (value, aux) if has_aux else value, jax.tree.unflatten(structure, grads), factors

    return wrapped


def _zeros(like: Any) -> jax.Array:
    """Zeros of a type: sharded along explicit axes, and varying along those of a shard_map, as it says."""
    explicit = not like.sharding.mesh.are_all_axes_auto
    zeros = jnp.zeros(like.shape, like.dtype, out_sharding=like.sharding if explicit else None)
    varying = tuple(like.manual_axis_type.varying)
    return lax.pcast(zeros, varying, to="varying") if varying else zeros


def _of_kernels(rows: Sequence[_Rows], params: optax.Params) -> dict[str, LayerFactors]:
    """The factors of each kernel, by its path."""
    paths, leaves = zip(*trees.paths_and_leaves(params).items(), strict=True)
    kernels = {
        kernel: [use for use in rows if use.kernel == kernel]
        for kernel in dict.fromkeys(use.kernel for use in rows)
    }
    biases = {kernel: {use.bias for use in uses} for kernel, uses in kernels.items()}
    taken = [bias for found in biases.values() for bias in found]
    factors = {}
    for kernel, uses in kernels.items():
        if len({len(use.inputs) for use in uses}) > 1:
            continue  # not the same examples
        inputs = _one_after_another([use.inputs for use in uses])
        output_grads = _one_after_another([use.output_grads for use in uses])
        factors[paths[kernel]] = LayerFactors(inputs, output_grads, None)
        (bias, *more) = biases[kernel]
        if bias is None or more or bias in kernels or taken.count(bias) > 1:
            continue
        if leaves[bias].size == output_grads.shape[-1]:
            factors[paths[kernel]] = LayerFactors(inputs, output_grads, paths[bias])
    return factors


def _one_after_another(uses: Sequence[jax.Array]) -> jax.Array:
    """The rows of all uses, as those of places."""
    if len(uses) == 1:
        return uses[0]
    return jnp.concatenate([x.reshape(len(x), -1, x.shape[-1]) for x in uses], axis=1)


def nnx_value_and_grad_with_factors(
    loss: Callable[..., Any], has_aux: bool = False
) -> Callable[..., tuple[Any, Any, dict[str, LayerFactors]]]:
    """As `flax.nnx.value_and_grad`, and the factors of K-FAC for each layer, from the same backward pass.

    What the loss does to the model's other variables (batch statistics, counts of random numbers) happens
    to the model. It must not change its other arguments: random numbers are the model's own.

    Args:
      loss: from a module, and anything else, to the mean loss; or to that and something more with
        `has_aux`.
      has_aux: as in `flax.nnx.value_and_grad`.

    Returns:
      A function with the arguments of `loss`, for use under `nnx.jit`. It returns the value (with the rest,
      if `has_aux`), the gradient by the variables of the type `nnx.Param`, as `nnx.Optimizer.update` takes
      it, and the factors of `value_and_grad_with_factors`, which has the rest: hand them on as
      `optimizer.update(model, grads, curvature=factors)`.

    Raises:
      ImportError: Flax is not installed.
      TypeError: as `value_and_grad_with_factors`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> from flax import nnx
      >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, mfac_jax.cgfac(0.1), wrt=nnx.Param)
      >>> loss = lambda model, x: jnp.mean(model(x) ** 2)
      >>> step = mfac_jax.nnx_value_and_grad_with_factors(loss)
      >>> value, grads, factors = step(model, jnp.ones((4, 3)))
      >>> _ = optimizer.update(model, grads, curvature=factors)
      >>> list(factors)
      ['kernel']
    """

    @functools.wraps(loss)
    def wrapped(model, *args, **kwargs):
        from flax import nnx  # the package does without; whoever has a module of nnx has it

        graph, params, others = nnx.split(model, nnx.Param, ...)

        def pure(params):
            model = nnx.merge(graph, params, others, copy=True)
            outputs = loss(model, *args, **kwargs)
            value, aux = outputs if has_aux else (outputs, None)
            return value, (aux, nnx.state(model, nnx.Not(nnx.Param)))

        evaluate = value_and_grad_with_factors(pure, has_aux=True)
        (value, (aux, others)), grads, factors = evaluate(params)
        nnx.update(model, others)
        return (value, aux) if has_aux else value, grads, factors

    return wrapped
