"""What is wrong with `dynamic_shapes`, said of one argument and dim; torch.export's own messages name neither."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

_LEGAL = "an int, a torch.export.Dim, Dim.AUTO, Dim.DYNAMIC or Dim.STATIC"


def misfit(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> str | None:
    """The first thing in `dynamic_shapes` that does not fit the example inputs, in a sentence; None when it all fits."""
    if dynamic_shapes is None:
        return None
    if not isinstance(dynamic_shapes, Mapping | tuple | list):
        return f"dynamic_shapes is a dict by argument name, such as {{'x': {{0: Dim('batch')}}}}, not a {type(dynamic_shapes).__name__}"
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError:
        return None
    return next(
        _misfits(dict(bound) if isinstance(dynamic_shapes, Mapping) else tuple(bound.values()), dynamic_shapes, "", tuple(bound)), None
    )


def _misfits(value: Any, spec: Any, path: str, names: tuple[str, ...] = ()) -> Iterator[str]:
    if spec is None:
        return
    if isinstance(value, torch.Tensor):
        yield from _tensor_misfits(value, spec, path)
    elif isinstance(value, Mapping) and isinstance(spec, Mapping):
        known = ", ".join(map(str, value))
        for key, item in spec.items():
            if key in value:
                yield from _misfits(value[key], item, f"{path}[{key!r}]" if path else str(key))
            else:
                yield f"dynamic_shapes names {path or 'argument'} {key}, but the example has {known}"
    elif isinstance(value, tuple | list) and isinstance(spec, tuple | list):
        if len(spec) != len(value):
            yield f"dynamic_shapes has {len(spec)} entries for {path or 'the arguments'}, but the example has {len(value)}"
        for index, (part, item) in enumerate(zip(value, spec, strict=False)):
            yield from _misfits(part, item, names[index] if names else f"{path}[{index}]")


def _tensor_misfits(value: torch.Tensor, spec: Any, path: str) -> Iterator[str]:
    rank = value.dim()
    if isinstance(spec, tuple | list) and len(spec) == rank:
        dims: Mapping[Any, Any] = dict(enumerate(spec))
    elif isinstance(spec, Mapping):
        dims = spec
    else:
        shown = f"{len(spec)} entries" if isinstance(spec, tuple | list) else repr(spec)
        yield f"dynamic_shapes gives {shown} for {path}, which has {rank} dims: write a dict by dim, such as {{0: Dim('batch')}}"
        return
    for dim, given in dims.items():
        if type(dim) is not int or not -rank <= dim < rank:
            yield f"dynamic_shapes names dim {dim!r} of {path}, which has {rank} dims, numbered from 0"
            continue
        reason = _dim_misfit(value.shape[dim], given)
        if reason is not None:
            yield f"dynamic_shapes of {path} dim {dim}: the example has {value.shape[dim]}, but {reason}"


def _dim_misfit(size: int, given: Any) -> str | None:
    if given is None or type(given).__name__ in ("_DimHint", "_DimHintType"):
        return None
    if isinstance(given, int):
        return None if given == size else f"the size given is {given}: give {size} or a torch.export.Dim"
    name, low, high = (getattr(given, attribute, None) for attribute in ("__name__", "min", "max"))
    if name is None or low is None or high is None:
        return f"{given!r} is given there, which must be {_LEGAL}"
    if hasattr(given, "root"):  # an expression such as 2*batch + 1
        factor, offset = given.fn(1) - given.fn(0), given.fn(0)
        whole, rest = divmod(size - offset, factor)
        if rest:
            return f"{name} is never {size}"
        reason = _dim_misfit(whole, given.root)
        return reason and f"that makes {given.root.__name__} {whole}, and {reason}"
    unbounded = not isinstance(high, int) or high >= 2**62
    return None if low <= size <= high else f"{name} {f'is at least {low}' if unbounded else f'ranges from {low} to {high}'}"
