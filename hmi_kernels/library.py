"""Registers the ops with torch.library, each as one road: gather, check, the backend's implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from hmi_kernels.backends import candidates

__all__ = ["Implementation", "define", "define_gradient", "implemented_in"]

_LIBRARY = torch.library.Library("hmi", "DEF")
Arguments = TypeVar("Arguments", bound=tuple[Any, ...])


def _refuses_nothing(arguments: Any) -> str:
    return ""


class Implementation(NamedTuple):
    """One backend's way to run an op.

    ``run`` takes the gathered arguments after the op's checks. ``refuses`` says why it cannot take these
    (another dtype, a size that its kernels do not know), "" if it can.
    """

    run: Callable[[Any], Any]
    refuses: Callable[[Any], str] = _refuses_nothing


def implemented_in(module: str, name: str) -> Implementation:
    """``module.name`` and ``module.<name>_refuses``, imported when first asked: for optional backends."""

    imported = cache(lambda: import_module(module))
    name_of_refuses = f"{name}_refuses"

    def run(arguments: Any) -> Any:
        return getattr(imported(), name)(arguments)

    def refuses(arguments: Any) -> str:
        return str(getattr(imported(), name_of_refuses)(arguments))

    return Implementation(run, refuses)


def define(
    schema: str,
    *,
    arguments: Callable[..., Arguments],
    check: Callable[[Arguments], None],
    implementations: dict[str, Implementation],
    reference: Callable[..., Any],
    fake: Callable[[Arguments], Any],
    may_be_on_host: tuple[str, ...] = (),
) -> Any:
    """Registers ``hmi::<schema>`` and returns the op, to be called like a function.

    ``arguments`` gathers what the schema names into a named tuple. ``check`` sees it first and raises; the
    ``implementations``, by the name of their backend, may rely on that, as may ``reference``, which takes
    the schema's own arguments. ``fake`` makes outputs of the right shape and dtype. Tensors of
    ``may_be_on_host`` may lie in host memory while the others lie on a device.
    """
    name = schema.split("(", maxsplit=1)[0]
    implemented = frozenset(implementations)

    def run(device_type: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gathered = arguments(*args, **kwargs)
        if device_type != "cpu":
            _require_one_device(gathered, may_be_on_host)
        check(gathered)
        reasons = []
        for backend in candidates(device_type, implemented):
            if backend == "reference":
                return reference(*args, **kwargs)
            implementation = implementations[backend]
            if not (reason := implementation.refuses(gathered)):
                return implementation.run(gathered)
            reasons.append(f"backend {backend} cannot run hmi::{name}: {reason}")
        raise ValueError("; ".join(reasons))

    def make_fake(*args: Any, **kwargs: Any) -> Any:
        return fake(arguments(*args, **kwargs))

    _LIBRARY.define(schema)
    # Dispatched to CPU only if every tensor is there, to CUDA if any is on a GPU.
    _LIBRARY.impl(name, lambda *args, **kwargs: run("cpu", args, kwargs), "CPU")
    _LIBRARY.impl(name, lambda *args, **kwargs: run("cuda", args, kwargs), "CUDA")
    torch.library.register_fake(f"hmi::{name}", make_fake, lib=_LIBRARY)
    return _Op(getattr(torch.ops.hmi, name).default, run)


class _Op:
    """A registered op, which is called without torch's dispatcher where nobody looks.

    That is in inference mode, where there are no gradients, if nobody compiles, profiles or intercepts ops:
    there the dispatcher, which calls back into Python, would take longer than the kernel of a small batch.
    """

    def __init__(self, registered: Any, run: Callable[[str, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self._registered, self._run = registered, run
        self.name = registered.name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled() or _is_anybody_looking():
            return self._registered(*args, **kwargs)
        first = args[0]
        if type(first) is not Tensor:
            return self._registered(*args, **kwargs)
        device_type = first.device.type
        if device_type == "cuda" or (_are_on_cpu(args) and _are_on_cpu(kwargs.values())):
            return self._run(device_type, args, kwargs)
        return self._registered(*args, **kwargs)


def _are_on_cpu(values: Iterable[Any]) -> bool:
    """Whether all tensors are: of several devices the dispatcher knows which one counts."""
    for value in values:
        if isinstance(value, Tensor):
            if not value.is_cpu:
                return False
        elif isinstance(value, list) and not _are_on_cpu(value):
            return False
    return True


def _is_anybody_looking() -> bool:
    """Whether the profiler runs, or something takes ops for itself."""
    return (
        torch._C._autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )


def define_gradient(
    op: Any, *, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., tuple[Any, ...]]
) -> None:
    """Registers the op's formula with autograd.

    ``save(ctx, arguments, output)`` sees the gathered arguments; ``backward(ctx, gradient)`` returns one
    gradient or None for each argument of the schema.
    """

    def setup_context(
        ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
    ) -> None:
        save(ctx, (*inputs, *keyword_only_inputs.values()), output)

    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)


def _tensors(arguments: tuple[Any, ...], names: Iterator[str]) -> Iterator[Tensor]:
    for name in names:
        value = getattr(arguments, name)
        yield from (
            item for item in (value if isinstance(value, list) else [value]) if isinstance(item, Tensor)
        )


def _require_one_device(arguments: Any, may_be_on_host: tuple[str, ...]) -> None:
    # Mostly all are on one, and then nothing has to be named.
    found_devices = set()
    for value in arguments:
        if isinstance(value, Tensor):
            found_devices.add(value.device)
        elif isinstance(value, list):
            found_devices.update([item.device for item in value if isinstance(item, Tensor)])
    if len(found_devices) < 2:
        return
    bound = (name for name in arguments._fields if name not in may_be_on_host)
    devices = {str(tensor.device) for tensor in _tensors(arguments, bound)}
    free = {str(tensor.device) for tensor in _tensors(arguments, iter(may_be_on_host))} - {"cpu"}
    if len(devices | free) > 1:
        found = ", ".join(sorted(devices | free))
        raise ValueError(f"all tensors must be on one device, but they are on {found}")
