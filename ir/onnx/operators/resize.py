"""Resizing of images. Where torch's own operators do what ONNX means they are used; else each dim takes its weighted neighbours in turn.

Source: the ONNX operator specification, Resize (coordinate_transformation_mode, mode, antialias).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..builder import Unsupported, Value, aten
from ..registry import Call, reader
from ..sizes import Size


@reader("Upsample")
def upsample(call: Call, x: Value, scales: Value = None) -> Value:
    factors = call.builder.constant(scales, "scales").tolist() if scales is not None else call.get("scales")
    sizes = [_scaled(size, factor) for size, factor in zip(call.builder.shape(x), factors, strict=True)]
    if call.get("mode", "nearest") == "nearest":
        call = replace(call, attributes=call.attributes | {"nearest_mode": "floor"})
    return _resized(call, x, list(range(len(sizes))), sizes, factors, "asymmetric", None)


@reader("Resize")
def resize(call: Call, x: Value, roi: Value = None, scales: Value = None, sizes: Value = None) -> Value:
    """Before opset 11 it is an Upsample that may also reduce; how it then rounds to the nearest, its standard leaves open."""
    builder = call.builder
    if call.version < 11:
        if call.get("mode", "nearest") == "nearest" and any(factor < 1 for factor in builder.constant(roi, "scales").tolist()):
            raise Unsupported("the nearest elements are the runtime's own before opset 11")
        return upsample(call, x, roi)
    dims = builder.dims(call.get("axes", list(range(builder.rank(x)))), builder.rank(x))
    mode = call.get("coordinate_transformation_mode", "half_pixel")
    old = [builder.shape(x)[dim] for dim in dims]
    region = builder.constant(roi, "region").tolist() if mode == "tf_crop_and_resize" and roi is not None else None
    if sizes is not None and builder.shape(sizes) != [0]:
        given = builder.sizes(sizes)
        if given is None:
            raise builder.depends(sizes, "list of sizes")
        new, factors = _kept_in_shape(call, old, list(given))
    else:
        factors = builder.constant(scales, "scales").tolist()
        new = [_scaled(size, factor) for size, factor in zip(old, factors, strict=True)]
    return _resized(call, x, dims, new, factors, mode, region)


def _scaled(size: Any, factor: float) -> Any:
    if not isinstance(size, Size):
        return int(np.floor(size * factor))
    if factor != int(factor):
        raise Unsupported("a symbolic size is scaled by a fraction")
    return size * int(factor)


def _kept_in_shape(call: Call, old: list[Any], wanted: list[Any]) -> tuple[list[Any], list[float | None]]:
    """Sizes and factors; by policy all dims are scaled alike."""
    policy = call.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return wanted, [None if isinstance(a, Size) or isinstance(b, Size) else b / a for a, b in zip(old, wanted, strict=True)]
    if any(isinstance(size, Size) for size in [*old, *wanted]):
        raise Unsupported(f"{policy} has a symbolic size")
    choose = min if policy == "not_larger" else max
    factor = choose(b / a for a, b in zip(old, wanted, strict=True))
    return [int(np.floor(size * factor + 0.5)) for size in old], [factor] * len(old)


def _resized(
    call: Call, x: Value, dims: list[int], new: list[Any], factors: list[float | None], mode: str, region: list[float] | None
) -> Value:
    builder, kind = call.builder, call.get("mode", "nearest")
    direct = _by_torch(call, x, dims, new, factors, mode, kind)
    if direct is not None:
        return direct
    dtype = builder.dtype(x)
    if kind != "nearest" and dtype != torch.float64:
        x = builder.cast(x, torch.float32)
    outside = None
    for place, dim in enumerate(dims):
        length, target, factor = builder.shape(x)[dim], new[place], factors[place]
        if factor == 1.0 and region is None:
            continue
        if isinstance(length, Size) or isinstance(target, Size) or factor is None:
            raise Unsupported("a symbolic size is resized in a way that torch has not")
        bounds = (0.0, 1.0) if region is None else (region[place], region[len(dims) + place])
        # Runtimes place in float32, which decides between neighbours where a place is between two.
        places = np.arange(target, dtype=np.float32 if kind == "nearest" else np.float64)
        coordinates = _coordinates(mode, length, places, places.dtype.type(factor), bounds)
        if mode == "tf_crop_and_resize":
            beyond = torch.from_numpy((coordinates < 0) | (coordinates > length - 1))
            shape = [-1 if other == dim else 1 for other in range(builder.rank(x))]
            outside = beyond.reshape(shape) if outside is None else outside | beyond.reshape(shape)
        x = _along(call, x, dim, coordinates, length, factor, kind)
    if outside is not None:
        x = builder.call(aten.masked_fill.Scalar, x, outside, call.get("extrapolation_value", 0.0))
    if kind != "nearest" and not dtype.is_floating_point:
        x = builder.call(aten.round.default, x)
        x = builder.call(aten.clamp.default, x, torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return builder.cast(x, dtype)


def _by_torch(call: Call, x: Value, dims: list[int], new: list[Any], factors: list[float | None], mode: str, kind: str) -> Value | None:
    """torch's resizing of the last two dims of four, where it is the same function; None where it is not."""
    builder = call.builder
    if builder.rank(x) != 4 or not builder.dtype(x).is_floating_point or call.get("antialias", 0) or call.get("exclude_outside", 0):
        return None
    by_dim = dict(zip(dims, zip(new, factors, strict=True), strict=True))
    if any(by_dim.get(dim, (0, 1.0))[1] != 1.0 for dim in (0, 1)) or 2 not in by_dim or 3 not in by_dim:
        return None
    sizes, scales = [by_dim[2][0], by_dim[3][0]], [by_dim[2][1], by_dim[3][1]]
    exact = all(
        factor is None or _divides(builder.shape(x)[dim], by_dim[dim][0], factor) for dim, factor in ((2, scales[0]), (3, scales[1]))
    )
    if not exact:  # a factor that is not the ratio of the sizes: torch takes the ratio
        return None
    whole = all(factor is not None and factor == int(factor) for factor in scales)
    if kind == "nearest" and mode == "asymmetric" and call.get("nearest_mode", "round_prefer_floor") == "floor":
        return builder.call(aten.upsample_nearest2d.default, x, sizes)
    # Of whole factors every rounding of (i + 0.5) / factor - 0.5 and of i / factor upsamples by repeating.
    if kind == "nearest" and whole and mode == "half_pixel" and call.get("nearest_mode", "round_prefer_floor") == "round_prefer_floor":
        return builder.call(aten.upsample_nearest2d.default, x, sizes)
    if kind == "linear" and mode == "align_corners":
        return builder.call(aten.upsample_bilinear2d.default, x, sizes, True)
    if kind == "linear" and mode in ("half_pixel", "pytorch_half_pixel") and all(_is_more_than_one(size, mode) for size in sizes):
        return builder.call(aten.upsample_bilinear2d.default, x, sizes, False)
    return None


def _divides(old: Any, new: Any, factor: float) -> bool:
    return isinstance(old, Size) or isinstance(new, Size) or new == old * factor


def _is_more_than_one(size: Any, mode: str) -> bool:
    """pytorch_half_pixel puts the one element of a dim at 0, and torch does not."""
    return mode == "half_pixel" or isinstance(size, Size) or size > 1


def _coordinates(mode: str, length: int, places: np.ndarray, factor: Any, region: tuple[float, float]) -> np.ndarray:
    """Where each element of the result, of which `places` are all, lies among those of x."""
    target = len(places)
    if mode == "half_pixel":
        return (places + 0.5) / factor - 0.5
    if mode == "half_pixel_symmetric":
        shift = length / 2 * (1 - target / (factor * length))
        return shift + (places + 0.5) / factor - 0.5
    if mode == "pytorch_half_pixel":
        return (places + 0.5) / factor - 0.5 if target > 1 else np.zeros(1)
    if mode == "align_corners":
        return places * (length - 1) / (target - 1) if target > 1 else np.zeros(target)
    if mode == "asymmetric":
        return places / factor
    if mode == "tf_half_pixel_for_nn":
        return (places + 0.5) / factor
    if mode == "tf_crop_and_resize":
        begin, end = region
        if target > 1:
            return begin * (length - 1) + places * (end - begin) * (length - 1) / (target - 1)
        return np.array([0.5 * (begin + end) * (length - 1)])
    raise Unsupported(f"its coordinate mode {mode} is not known")


_NEAREST: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda place: np.ceil(place - 0.5),
    "round_prefer_ceil": lambda place: np.floor(place + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _along(call: Call, x: Value, dim: int, coordinates: np.ndarray, length: int, factor: float, kind: str) -> Value:
    """The elements at `coordinates` of one dim, in between by `kind`."""
    builder = call.builder
    if kind == "nearest":
        index = _NEAREST[call.get("nearest_mode", "round_prefer_floor")](coordinates).clip(0, length - 1).astype(np.int64)
        return builder.call(aten.index_select.default, x, dim, torch.from_numpy(index))
    neighbours, weights = _neighbours(call, coordinates, factor, kind)
    if call.get("exclude_outside", 0):
        weights = np.where((neighbours < 0) | (neighbours >= length), 0.0, weights)
        weights = weights / weights.sum(1, keepdims=True)
    matrix = np.zeros((len(coordinates), length))
    for column in range(neighbours.shape[1]):
        np.add.at(matrix, (np.arange(len(coordinates)), neighbours[:, column].clip(0, length - 1)), weights[:, column])
    table = torch.from_numpy(matrix).to(builder.dtype(x))
    moved = builder.call(aten.transpose.int, x, dim, -1)
    return builder.call(aten.transpose.int, builder.call(aten.matmul.default, moved, table.T.contiguous()), dim, -1)


def _neighbours(call: Call, coordinates: np.ndarray, factor: float, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """For each coordinate the places that it is made of, [n, taps], and how much of each."""
    stretch = 1.0
    if call.get("antialias", 0) and factor < 1:
        stretch = factor
    reach = {"linear": 1.0, "cubic": 2.0}.get(kind)
    if reach is None:
        raise Unsupported(f"its mode {kind} is not known")
    taps = int(np.ceil(2 * reach / stretch)) + 1 if stretch < 1 else int(2 * reach)
    first = np.floor(coordinates - reach / stretch).astype(np.int64) + 1
    places = first[:, None] + np.arange(taps)
    distance = np.abs(coordinates[:, None] - places) * stretch
    weights = np.maximum(1 - distance, 0) if kind == "linear" else _cubic(distance, call.get("cubic_coeff_a", -0.75))
    return places, weights / weights.sum(1, keepdims=True)


def _cubic(d: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic of a distance."""
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


@reader("GridSample")
def grid_sample(call: Call, x: Value, grid: Value) -> Value:
    builder = call.builder
    mode = {"linear": 0, "bilinear": 0, "nearest": 1, "cubic": 2, "bicubic": 2}[call.get("mode", "linear")]
    padding = {"zeros": 0, "border": 1, "reflection": 2}[call.get("padding_mode", "zeros")]
    corners = bool(call.get("align_corners", 0))
    if builder.rank(x) == 4:
        return builder.call(aten.grid_sampler.default, x, grid, mode, padding, corners)
    if builder.rank(x) == 5 and mode != 2:
        return builder.call(aten.grid_sampler.default, x, grid, mode, padding, corners)
    raise Unsupported("torch samples images and volumes, the latter not by cubics")
