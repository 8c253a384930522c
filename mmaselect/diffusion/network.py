"""Any diffusers network as a reader: a dry run finds what its taps need, and its own ``forward`` is stopped there.

A dry run on the meta device costs no memory. It notes in which order the taps appear, their channels and stride, which
parameters were used until the last of them, and which modules do not depend on the latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mmaselect.errors import InputError

#: Images of a dry run: a prime that no dimension but the batch has.
BATCH = 8191
#: Timesteps whose constants are kept. A sweep over more computes them once per pass, at batch 1, which costs little.
KEPT_TIMESTEPS = 8


class Site(NamedTuple):
    """Where in a diffusers network a tap is.

    Attributes:
        module: Path of a module.
        item: Which of its outputs, where there are several.
        reads_input: Take the module's first input instead.
        merge: Axes that heads and their channels are on, where the module gives them apart: (1, 3) for
            (B, heads, N, d), (2, 3) for (B, N, heads, d).
        query: Path of the module that gives the queries, where ``module`` gives the keys: the tap is what
            :func:`attention_map` makes of both.
        heads: Of that attention.
        part: Channels ``(first, one behind the last)`` of a layer that gives several things at once.
    """

    module: str
    item: int = 0
    reads_input: bool = False
    merge: tuple[int, int] | None = None
    query: str | None = None
    heads: int = 1
    part: tuple[int, int] | None = None

    def pick(self, value: Any) -> Tensor:
        """The tensor among the module's inputs or outputs: tokens (B, N, C), or a map (B, C, h, w)."""
        value = value[self.item] if isinstance(value, (tuple, list)) else value
        value = value if self.part is None else value[..., slice(*self.part)]
        return value if self.merge is None else value.movedim(self.merge, (2, 3)).flatten(2)


def attention_map(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """The weights of an attention, ``softmax(Q K^T / sqrt(d))``, averaged over its heads.

    Args:
        query: (B, N, heads * d).
        key: (B, M, heads * d).
        heads: One after the other, so that the weights of all heads are never in memory together.

    Returns:
        (B, N, M): a channel for each key; channels sum to 1.
    """
    mean = query.new_zeros(())
    for one, other in zip(query.chunk(heads, -1), key.chunk(heads, -1)):
        scores = one @ other.transpose(1, 2) / one.shape[-1] ** 0.5
        mean = mean + scores.softmax(-1, dtype=torch.float32) / heads
    return mean.to(query.dtype)


def leaves_of(tree: Any) -> list[Any]:
    """What lies in nested lists, tuples and dicts."""
    return tree_flatten(tree)[0]


def _map_both(function: Callable[[Any, Any], Any], tree: Any, alike: Any) -> Any:
    """Maps pairs of leaves, which torch's ``tree_map`` does since 2.3."""
    leaves, spec = tree_flatten(tree)
    return tree_unflatten(list(map(function, leaves, leaves_of(alike))), spec)


@dataclass
class Plan:
    """What a dry run found out.

    Attributes:
        shapes: Channels and stride (in latent pixels) of each tap, in the order in which a pass reaches them.
        parameters: Names of those that a pass uses, up to the last tap.
        constants: Modules that give the same for all images, by name; see :class:`Constant`.
        folded: Names of the parameters that nothing but these modules uses: once their outputs are known, they may go.
    """

    shapes: dict[Any, tuple[int, int]] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    constants: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)


class _Stop(Exception):
    """Ends diffusers' forward pass."""


@contextmanager
def reading(network: nn.Module, sites: Mapping[Any, Site], visit: Callable[[Any, Tensor], object]) -> Iterator[None]:
    """Within it, a call of the network hands every tap to ``visit`` and ends at the last one.

    Args:
        network: A diffusers model.
        sites: Where each tap is.
        visit: Gets each tap and what :meth:`Site.pick` gives, when the pass is there.

    Raises:
        InputError: If the pass ended and had not reached every tap.
    """
    missing = dict.fromkeys(sites)
    queries: dict[str | None, Tensor] = {}

    def make(tap: Any, site: Site) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, output: Any = None) -> None:
            if tap not in missing:
                return
            value = site.pick(inputs if site.reads_input else output)
            visit(tap, attention_map(queries.pop(site.query), value, site.heads) if site.query else value)
            del missing[tap]
            if not missing:
                raise _Stop

        return hook

    with ExitStack() as stack:
        for path in {site.query for site in sites.values() if site.query}:
            hook = partial(lambda path, _, __, output: queries.__setitem__(path, output), path)
            stack.callback(network.get_submodule(path).register_forward_hook(hook).remove)
        for tap, site in sites.items():
            module = network.get_submodule(site.module)
            register = module.register_forward_pre_hook if site.reads_input else module.register_forward_hook
            stack.callback(register(make(tap, site)).remove)
        with suppress(_Stop):
            yield
            raise InputError(f'{next(iter(missing))} was not reached: this network does not run it')


def _broadcast(first: Tensor, second: Any, *_: Any, **more: Any) -> Any:
    if isinstance(second, (int, float)) and first.is_floating_point():
        return torch.empty_like(first)
    if not isinstance(second, Tensor) or second.dtype != first.dtype or more or 0 in (*first.shape, *second.shape):
        return NotImplemented
    longer, shorter = sorted((first.shape, second.shape), key=len, reverse=True)
    padded = (1,) * (len(longer) - len(shorter)) + tuple(shorter)
    return first.new_empty(tuple(map(max, longer, padded)))


def _alike(value: Tensor, *_: Any, **__: Any) -> Any:
    return torch.empty_like(value) if value.is_floating_point() else NotImplemented


def _mean(value: Tensor, dim: Any = None, keepdim: bool = False, **more: Any) -> Any:
    if not isinstance(dim, int) or more:
        return NotImplemented
    return value.narrow(dim, 0, 1) if keepdim else value.select(dim, 0)


#: Functions by name that torch works out in Python on the meta device, which is most of a dry run. A shape is all that
#: is asked of them.
QUICK: dict[str, Callable[..., Any]] = {
    'linear': lambda value, weight, *_: value.new_empty((*value.shape[:-1], len(weight))),
    **dict.fromkeys(('layer_norm', 'group_norm', 'rms_norm', 'gelu', 'silu', 'rsqrt'), _alike),
    'scaled_dot_product_attention': lambda query, key, value, *_, **__: query.new_empty(
        (*query.shape[:-1], value.shape[-1])
    ),
    **dict.fromkeys(('mul', 'add', 'div'), _broadcast),
    'pow': lambda value, power=None, **_: _broadcast(value, power) if isinstance(power, int) else NotImplemented,
    'mean': _mean,
}


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts; torch's own walk takes a third of a dry run."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for one in value for tensor in tensors_in(one)]
    return tensors_in(list(value.values())) if isinstance(value, dict) else []


class _Trace(TorchFunctionMode):
    """Notes which parameters any operation receives, and which tensors depend on the latent."""

    def __init__(self, network: nn.Module, latent: Tensor) -> None:
        super().__init__()
        self.names = {id(value): name for name, value in network.named_parameters()}
        # Parameters, with the modules that use them.
        self.used: dict[str, set[str]] = {}
        self.inside: list[str] = ['']
        # The tensors are held, so that no other gets their number.
        self.depending = {id(latent): latent}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, '__name__', '')
        quick = QUICK.get(name)
        out = NotImplemented if quick is None else quick(*args, **kwargs)
        if out is NotImplemented:
            out = func(*args, **kwargs)
        read = [*tensors_in(args), *tensors_in(kwargs)]
        # To ask a parameter for its dtype is not to use it.
        if name != '__get__':
            for value in read:
                if id(value) in self.names:
                    self.used.setdefault(self.names[id(value)], set()).add(self.inside[-1])
        if self.depends(read):
            # In-place operations change what they are called on.
            changed = read[:1] if name == '__setitem__' or (name.endswith('_') and not name.endswith('__')) else []
            for value in [*tensors_in(out), *changed]:
                self.depending[id(value)] = value
        return out

    def depends(self, tensors: Iterable[Tensor]) -> bool:
        """Whether any of them does."""
        return any(id(one) in self.depending for one in tensors)


@contextmanager
def _told_of_indexing() -> Iterator[None]:
    """Within it, a mode learns that ``parameter[...]`` was read, which torch 2.1 does not tell it."""
    if torch.__version__ >= '2.6':
        yield
        return
    kind: Any = nn.Parameter
    kind.__getitem__ = lambda self, index: self.view_as(self)[index]
    try:
        yield
    finally:
        del kind.__getitem__


def dry_run(network: nn.Module, sites: Mapping[Any, Site], latent: Tensor, call: Callable[[Tensor], object]) -> Plan:
    """Finds out what a pass up to the last tap is made of.

    Args:
        network: On the meta device.
        sites: Where each tap is.
        latent: (B, C, H, W), on the meta device, square; B is a prime that no other dimension has.
        call: Runs the network on it.

    Returns:
        The plan.

    Raises:
        InputError: If the pass does not reach every tap.
    """
    plan, trace, calls = Plan(), _Trace(network, latent), dict[str, int]()
    is_batched, is_mixed = partial(_is_batched, batch=len(latent)), partial(_is_mixed, batch=len(latent))
    found: dict[str, tuple[Any, Any]] = {}

    def visit(tap: Any, value: Tensor) -> None:
        plan.shapes.setdefault(tap, _channels_and_stride(value, (latent.shape[2], latent.shape[3])))

    def enter(name: str, *_: Any) -> None:
        trace.inside.append(name)

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            trace.inside.pop()
            calls[name] = calls.get(name, 0) + 1
            tensors, given = [*tensors_in(args), *tensors_in(kwargs)], tensors_in(output)
            if tensors and not trace.depends(chain(tensors, given)) and not any(map(is_mixed, chain(tensors, given))):
                found[name] = (tree_map(is_batched, (args, kwargs)), tree_map(is_batched, output))

        return hook

    with ExitStack() as stack:
        paths = (name.split('.')[:-1] for name, _ in network.named_parameters())
        owners = {'.'.join(path[:depth]) for path in paths for depth in range(1, len(path) + 1)}
        for name, module in network.named_modules():
            if name in owners:
                stack.callback(module.register_forward_pre_hook(partial(enter, name)).remove)
                stack.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        with torch.no_grad(), trace, _told_of_indexing(), reading(network, sites, visit):
            call(latent)
    plan.parameters = set(trace.used)
    outermost: list[str] = []
    for name in sorted(found):
        if calls[name] == 1 and not within(name, outermost):
            outermost.append(name)
            plan.constants[name] = found[name]
    plan.folded = {name for name, users in trace.used.items() if all(within(user, outermost) for user in users)}
    return plan


def within(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules, or inside one."""
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def _is_mixed(value: Tensor, batch: int) -> bool:
    """Whether the batch and another axis were made one: what belongs to one image is not found again."""
    return any(size > batch and size % batch == 0 for size in value.shape)


def _is_batched(value: Any, batch: int) -> bool:
    """Whether a tensor has the batch in front, or a number is its size."""
    return len(value) == batch if isinstance(value, Tensor) and value.dim() else type(value) is int and value == batch


def _first(value: Any, batched: bool) -> Any:
    if not batched:
        return value
    return value[:1] if isinstance(value, Tensor) else 1


def _channels_and_stride(value: Tensor, size: tuple[int, int]) -> tuple[int, int]:
    """Of a map (B, C, h, w) or of tokens (B, N, C); the latent is square.

    Raises:
        InputError: If it is neither, as of a module that reads no image.
    """
    if value.dim() not in (3, 4) or (value.dim() == 3 and value.shape[1] == 1):
        raise InputError(f'a tensor of {tuple(value.shape)[1:]} per image is no map: choose another module for taps')
    if value.dim() == 4:
        return value.shape[1], round(size[0] / value.shape[2])
    return value.shape[2], max(1, round((size[0] * size[1] / value.shape[1]) ** 0.5))


def to_map(value: Tensor, size: tuple[int, int], stride: int, image_first: bool = False) -> Tensor:
    """What a tap gives as a map.

    Args:
        value: (B, C, h, w), or tokens (B, N, C), of which the image's come last.
        size: Height and width of the latent.
        stride: Latent pixels per cell.
        image_first: The image's tokens come first instead.

    Returns:
        (B, C, h, w).
    """
    if value.dim() == 4:
        return value
    rows, columns = (-(-length // stride) for length in size)
    tokens = value[:, : rows * columns] if image_first else value[:, -rows * columns :]
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def drop_unused(network: nn.Module, used: set[str]) -> None:
    """Takes out of a network, in place, all parameters that are not named."""
    for prefix, module in network.named_modules():
        for name in list(module._parameters):
            if (f'{prefix}.{name}' if prefix else name) not in used:
                module._parameters[name] = None


class Constants:
    """Outputs of modules that do not depend on the image, of the last few timesteps."""

    def __init__(self) -> None:
        self._known: dict[Any, dict[str, Any]] = {}
        self.batch = 1
        self.now: dict[str, Any] = {}

    def begin(self, key: Any, batch: int) -> None:
        """Turns to a timestep; the latest stands last, and the first is the one that goes."""
        self.batch, self.now = batch, self._known.pop(key, {})
        self._known[key] = self.now
        if len(self._known) > KEPT_TIMESTEPS:
            del self._known[next(iter(self._known))]

    def has(self, key: Any, names: Iterable[str]) -> bool:
        """Whether the outputs of all these modules are known for a timestep."""
        return all(name in self._known.get(key, {}) for name in names)

    def clear(self) -> None:
        """Forgets them all."""
        self._known.clear()
        self.now = {}

    def __len__(self) -> int:
        return len(self._known)


class Constant:
    """In place of a module's ``forward``: computes it for one image, once per timestep.

    Args:
        module: The module.
        name: Its name.
        plan: Which of its inputs and outputs have a batch, see :class:`Plan`.
        constants: Where outputs are kept.
    """

    def __init__(self, module: nn.Module, name: str, plan: tuple[Any, Any], constants: Constants) -> None:
        self.module, self.name, self.constants = module, name, constants
        self.inputs, self.outputs = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's own, for the whole batch."""
        if self.name not in self.constants.now:
            args, kwargs = _map_both(_first, (args, kwargs), self.inputs)
            self.constants.now[self.name] = type(self.module).forward(self.module, *args, **kwargs)
        size = self.constants.batch
        return _map_both(
            lambda one, batched: one.expand(size, *one.shape[1:]) if batched else one,
            self.constants.now[self.name],
            self.outputs,
        )


def fold(network: nn.Module, plan: Plan, constants: Constants, but: Sequence[str] = ()) -> list[str]:
    """Makes a network compute its constants once per timestep.

    Args:
        network: The network, changed in place.
        plan: Of its dry run.
        constants: Where they are kept.
        but: Paths of modules in which nothing is folded.

    Returns:
        Names of the modules that are computed once.
    """
    for module in network.modules():
        if isinstance(module.__dict__.get('forward'), Constant):
            del module.forward
    names = [name for name in plan.constants if not within(name, but)]
    for name in names:
        module = network.get_submodule(name)
        module.forward = Constant(module, name, plan.constants[name], constants)  # type: ignore[method-assign]
    return names
