"""Metadata of a call, computed from the metadata of its operands by running it on fake tensors.

Views share a fake storage with their source, so `val` also says what aliases what. Metadata is inferred when a node is
created and never edited; a stale shape is the commonest defect of compilers that edit graphs freely.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, UnsupportedOperatorException, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch

from .calls import GETITEM, is_size_function
from .errors import first_line
from .region import Region
from .symbols import MAX_TERMS, SymbolTable, fits, hint, is_short_product, is_tractable, same_size


class InferenceError(Exception):
    """torch refuses the call for operands of these types; the message is torch's own first line."""


def infer(symbols: SymbolTable, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The value of `target(*args, **kwargs)` in types only; operand nodes stand for their `meta["val"]`.

    Raises:
        InferenceError: the call does not type-check.
    """
    operands, keywords = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
    if is_size_function(target):
        _check_numbers((*operands, *keywords.values()))
    _check_terms(target, (*operands, *keywords.values()))
    if target is GETITEM and not (operands and isinstance(operands[0], tuple)):
        raise InferenceError("it takes a result out of a call that has several")
    key = _key_of(symbols, target, operands, keywords)
    known = _find(symbols, key) if key is not None else None
    if known is not None:
        return known.anew(symbols, (operands, keywords))
    _check_dim(target, operands, keywords)
    try:
        with symbols.inference(), torch.amp.autocast("cpu", enabled=False):
            value = target(*operands, **keywords)
            if _gives_its_operand(target, operands, keywords):
                value = operands[0]
    except UnsupportedOperatorException as error:
        is_sparse = "sparse" in str(target)
        sparse = "it gives a sparse tensor, and the IR has strided ones: convert it inside the model"
        raise InferenceError(sparse if is_sparse else "torch cannot tell what it gives without running it") from error
    except Exception as error:
        raise InferenceError(first_line(error)) from error
    for tensor in tensors_of(value):
        if tensor.layout != torch.strided:
            kind = str(tensor.layout).removeprefix("torch.")
            raise InferenceError(f"it gives a {kind} tensor, and the IR has strided ones: convert it inside the model")
        if not all(map(is_tractable, tensor.shape)):
            raise InferenceError("a size of what it gives has too many products inside quotients")
    if key is not None and (inferred := Inferred.of(value, (operands, keywords))) is not None:
        _note(symbols, key, inferred)
    if isinstance(value, int | torch.SymInt):
        if not fits(value):
            raise InferenceError("the size that it gives does not fit in 64 bits")
        if not is_tractable(value):
            raise InferenceError("the size that it gives has too many products inside quotients")
    return tuple(value) if isinstance(value, list) else value


# --- what calls are known to give ----------------------------------------------------------------------------------------------

# Types of symbolic sizes cost milliseconds a call, and the body of a dialect operator is some hundred calls. The layers of a network
# repeat both on equal types, and so do programs of the same sizes.

MOST_KNOWN = 2**14
_KNOWN: "dict[Any, Inferred]" = {}  # of every program, by what they follow from, the declarations of symbols among it


@dataclass(frozen=True)
class ResultType:
    """The type of a call's result; sizes are numbers or sympy expressions. `source` is the place, among the tensors that the call reads,
    of the one whose memory it is a view of; None where its memory is its own."""

    dtype: torch.dtype
    shape: tuple[Any, ...]
    stride: tuple[Any, ...]
    offset: Any
    device: torch.device
    source: int | None

    @classmethod
    def of(cls, result: torch.Tensor, read: list[torch.Tensor]) -> "ResultType | None":
        """None where the result cannot be made anew from its type."""
        if result.layout != torch.strided or result.is_conj() or result.is_neg() or any(result is each for each in read):
            return None
        sources = [place for place, each in enumerate(read) if storage_key(each) == storage_key(result)]
        source = sources[0] if sources else None
        if len(sources) > 1 or (source is None and result.storage_offset() != 0):
            return None
        if source is not None and (read[source].dtype != result.dtype or read[source].is_conj() or read[source].is_neg()):
            return None
        shape, stride = (tuple(map(_expression, each)) for each in (result.shape, result.stride()))
        return cls(result.dtype, shape, stride, _expression(result.storage_offset()), result.device, source)

    def anew(self, symbols: SymbolTable, read: list[torch.Tensor]) -> torch.Tensor:
        shape, stride = ([symbols.sized(size) for size in each] for each in (self.shape, self.stride))
        if self.source is None:
            return fake_like(symbols, self.dtype, shape, stride, self.device)
        with in_kernel_invocation_manager(symbols.mode), symbols.env.suppress_guards(), torch.no_grad():
            view = read[self.source].as_strided(shape, stride, symbols.sized(self.offset))
        return FakeTensor(symbols.mode, view, self.device)


@dataclass(frozen=True)
class Inferred:
    """The types of a call's results, no two of which share memory unless it is an operand's."""

    results: tuple[ResultType, ...]
    is_single: bool

    @classmethod
    def of(cls, value: Any, operands: Any) -> "Inferred | None":
        """None where results cannot be made anew from their types."""
        results, read = tensors_of(value), _tensors_in(operands)
        if not results or (isinstance(value, tuple | list) and len(results) < len(value)):
            return None
        if not _symbols_of(_sizes_in(results)) <= _symbols_of(_sizes_in(operands)):  # a size that depends on data, which is not asked
            return None
        types = [ResultType.of(each, read) for each in results]
        known = tuple(each for each in types if each is not None)
        own = [storage_key(result) for result, each in zip(results, types, strict=True) if each is not None and each.source is None]
        if len(known) < len(types) or len(set(own)) < len(own):
            return None
        sizes = [size for each in known for size in (*each.shape, *each.stride, each.offset) if not isinstance(size, int)]
        if not all(size.free_symbols for size in sizes):
            return None
        return cls(known, isinstance(value, torch.Tensor))

    def anew(self, symbols: SymbolTable, operands: Any) -> Any:
        read = _tensors_in(operands)
        results = tuple(each.anew(symbols, read) for each in self.results)
        return results[0] if self.is_single else results


def _find(symbols: SymbolTable, key: "_Key") -> "Inferred | None":
    """What a call of that key is known to give, in this program or in another."""
    known = symbols.inferred.get(key.call)
    if known is None and (known := _KNOWN.get(_shared_key(symbols, key))) is not None:
        symbols.inferred[key.call] = known
    return known


def _note(symbols: SymbolTable, key: "_Key", inferred: "Inferred") -> None:
    if len(_KNOWN) >= MOST_KNOWN:
        _KNOWN.clear()
    symbols.inferred[key.call] = _KNOWN[_shared_key(symbols, key)] = inferred


def forget() -> None:
    """Nothing is known of other programs any more: for those who change what an operator is, as planted mistakes do."""
    _KNOWN.clear()


def _shared_key(symbols: SymbolTable, key: "_Key") -> Any:
    """The key and what else the types follow from between programs."""
    libraries = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled  # by which a convolution lays its result out
    return (*key, len(symbols) > 0, torch.get_default_dtype(), *libraries)


class _Key(NamedTuple):
    """What the types of an operator's results follow from: in one program `call`, and the declarations of the symbols that it reads."""

    call: Any
    declared: Any


def _key_of(symbols: SymbolTable, target: Callable[..., Any], operands: Any, keywords: Any) -> _Key | None:
    """None for other targets than operators, for calls that read no tensor, whose device may be a default, where a size depends on data, of
    which nothing may be asked, and for operands of other kinds than these."""
    if getattr(target, "namespace", "") not in ("gw", "aten") or not _tensors_in((operands, keywords)):
        return None
    read = _symbols_of(_sizes_in((operands, keywords)))
    if len(read) > MAX_SYMBOLS:
        raise InferenceError(f"it reads {len(read)} symbols, more than the limit of {MAX_SYMBOLS}")
    declared = symbols.declared(read)
    if declared is None:
        return None
    try:
        return _Key((target, _key(operands), tuple((name, _key(keywords[name])) for name in sorted(keywords))), declared)
    except TypeError:
        return None


def _key(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        sizes = tuple(map(_key, (*value.shape, *value.stride(), value.storage_offset())))
        return ("tensor", value.dtype, value.device, value.layout, value.is_conj(), value.is_neg(), value.dim(), sizes)
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    if isinstance(value, tuple | list):
        return tuple(map(_key, value))
    if type(value) is int:
        return value
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.memory_format | torch.layout):
        return (type(value), repr(value))  # which tells -0.0 from 0.0
    raise TypeError(f"a {type(value).__name__} is no key")


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    return [leaf for each in value for leaf in _leaves(each)] if isinstance(value, tuple | list) else [value]


def _tensors_in(operands: Any) -> list[torch.Tensor]:
    return [each for each in _leaves(operands) if isinstance(each, torch.Tensor)]


def _sizes_in(operands: Any) -> list[Any]:
    """Sizes among operands and of their tensors, as numbers or sympy expressions."""
    found: list[Any] = []
    for value in _leaves(operands):
        if isinstance(value, torch.Tensor):
            found += map(_expression, (*value.shape, *value.stride(), value.storage_offset()))
        elif isinstance(value, torch.SymInt):
            found.append(_expression(value))
    return found


def _symbols_of(sizes: Iterable[Any]) -> set[Any]:
    return set().union(*(size.free_symbols for size in sizes if not isinstance(size, int)))


def _gives_its_operand(target: Any, operands: Sequence[Any], keywords: Mapping[str, Any]) -> bool:
    """Whether it is dropout that draws nothing: torch gives back what it was given, of which its decomposition for symbols makes a copy."""
    if target is not torch.ops.aten.dropout.default or not operands:
        return False
    p, train = (*operands[1:], *(keywords[name] for name in ("p", "train")[len(operands) - 1 :]))
    return not train or p == 0


MAX_RESULTS = 2**14  # of one call
MAX_FACTORS, MAX_SYMBOLS = 128, 256  # of one call
_APART = ("split", "split_with_sizes", "split_copy", "unsafe_split", "unsafe_chunk", "chunk", "unbind", "unbind_copy", "tensor_split")
_NEW_DIM = ("unsqueeze", "unsqueeze_copy")  # whose dim is one of the result


def _check_dim(target: Any, operands: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """That the dim of an ATen call is one of its tensor: torch's own inference takes any for softmax, sort and some others, and then the
    call fails. And that a call which takes a tensor apart gives no more tensors than anybody reads: a short text may ask for billions."""
    if getattr(target, "namespace", "") != "aten":
        return
    name = target._schema.name.removeprefix("aten::")
    named = dict(zip((each.name for each in target._schema.arguments), operands, strict=False)) | dict(keywords)
    factors = named.get("matrices", named.get("tensors")) if name in ("chain_matmul", "linalg_multi_dot") else None
    if isinstance(factors, tuple | list) and len(factors) > MAX_FACTORS:  # torch tries all orders
        raise InferenceError(f"it multiplies {len(factors)} matrices, more than the limit of {MAX_FACTORS}")
    if name in ("matrix_power", "linalg_matrix_power") and named.get("n") == -(2**63):
        raise InferenceError(f"{-(2**63)} has no opposite in 64 bits")  # torch multiplies without end
    whole, dim = named.get("self"), named.get("dim", 0)
    if not isinstance(whole, torch.Tensor) or type(dim) is not int or name in _NEW_DIM:
        return
    rank = max(whole.dim(), 1)
    if "dim" in named and not -rank <= dim < rank:
        raise InferenceError(f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], but got {dim})")
    if name in _APART and whole.dim() and (pieces := _pieces(named, hint(whole.shape[dim]))) > MAX_RESULTS:
        raise InferenceError(f"it gives {pieces} tensors, more than the limit of {MAX_RESULTS}")


def _pieces(named: Mapping[str, Any], length: int) -> int:
    """How many tensors it gives; 0 where a list says how many."""
    match named:
        case {"split_size": int(size)}:
            return length // max(size, 1)
        case {"chunks": int(count)}:
            return min(length, count)
        case {"sections": int(count)}:
            return count
        case {"split_size": _} | {"split_sizes": _} | {"indices": _}:
            return 0
        case _:
            return length


HOLE: Any = object()  # stands for an operand in a seal


def sealed(target: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, ...]:
    """What a call's metadata was inferred from: operation, attributes, and the metadata objects of its operands, which copies of a program
    share. While these are the same objects, the metadata holds."""
    skeleton = fx.map_arg((args, kwargs), lambda operand: HOLE)
    return (target, skeleton, tuple(operand.meta.get("val") for operand in operands_of((args, kwargs))))


def _check_terms(target: Any, operands: Sequence[Any]) -> None:
    """That no product of sums has more terms than can be multiplied out: of two sizes, of a power, of the sizes of a shape."""
    factors = [each for each in operands if isinstance(each, tuple | list)]
    if target is operator.mul:
        factors.append(operands)
    elif target is operator.pow and len(operands) == 2 and isinstance(operands[1], int):
        factors.append(operands[:1] * min(abs(operands[1]), MAX_TERMS))
    if any(not is_short_product(each) for each in factors):
        raise InferenceError(f"a size that it takes or gives has more than {MAX_TERMS} terms when it is multiplied out")


def _check_numbers(operands: Iterable[Any]) -> None:
    """Python's operators take strings and lists too, of which a product is as long as the factor says."""
    for operand in operands:
        if not isinstance(operand, int | float | torch.SymInt | torch.SymFloat | torch.SymBool):
            kind = "list" if isinstance(operand, list) else type(operand).__name__
            raise InferenceError(f"it takes sizes and numbers, not a {kind}")


def fake_like(symbols: SymbolTable, dtype: torch.dtype, shape: Any, stride: Any, device: torch.device) -> torch.Tensor:
    """A tensor of that type in the program's mode, with a storage of its own."""
    with no_dispatch(), symbols.env.suppress_guards():
        elements = torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device="meta")
    return FakeTensor(symbols.mode, elements, device)


def contiguous_stride(shape: Any) -> tuple[Any, ...]:
    """Row-major strides, with torch's convention that a dim of size 0 counts as 1."""
    strides: list[Any] = []
    step: Any = 1
    for size in reversed(list(shape)):
        strides.append(step)
        step = step * (size if not isinstance(size, int) or size > 0 else 1)
    return tuple(reversed(strides))


def is_channels_last(shape: Any, stride: Any) -> bool:
    """Whether ATen takes the channels, dim 1, to lie innermost: its rule, `suggest_memory_format`, for sizes that are numbers. Strides
    of dims of size 1 count, although they address nothing."""
    if len(shape) not in (4, 5) or not all(isinstance(n, int) for n in (*shape, *stride)) or stride[1] == 0:
        return False
    least = 0
    for dim in (1, *reversed(range(2, len(shape))), 0):
        if shape[dim] == 0 or stride[dim] < least or (dim == 0 and least == stride[1]):
            return False
        least = stride[dim] * max(shape[dim], 1)
    return True


def has_gaps(shape: Iterable[int], stride: Iterable[int]) -> bool:
    """Whether a tensor's elements, taken in order of their addresses, do not follow one another without a gap or an overlap."""
    expected, gaps = 1, False
    for step, size in sorted((step, size) for size, step in zip(shape, stride, strict=True) if size != 1):
        gaps |= step != expected
        expected *= size
    return gaps and expected != 0


def same_type(a: Any, b: Any) -> bool:
    """Whether two metadata values are one type: dtype, device, shape, lazy conjugation, strides. Those of dims of size 1 too: they address
    nothing, but by them operations tell how to lay out what they make, channels last for one, and so what the next operation reads."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(same_type(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same_tensor_type(a, b) and same_strides(a, b, of_all=True)
    if isinstance(a, int | torch.SymInt) and isinstance(b, int | torch.SymInt):
        return same_size(a, b, exact=True)
    if isinstance(a, torch.SymFloat | torch.SymBool) and isinstance(b, torch.SymFloat | torch.SymBool):
        return type(a) is type(b)
    return type(a) is type(b) and (a == b or a != a)


def same_tensor_type(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, device, shape and what is left to do to the elements (a lazy conjugate) agree."""
    return (
        a.dtype == b.dtype
        and (a.is_conj(), a.is_neg()) == (b.is_conj(), b.is_neg())
        and a.device == b.device
        and a.dim() == b.dim()
        and all(same_size(x, y, exact=True) for x, y in zip(a.shape, b.shape, strict=True))
    )


def same_strides(a: torch.Tensor, b: torch.Tensor, *, of_all: bool = False) -> bool:
    """Whether strides agree on every dim larger than 1 (the others address nothing), or on all."""
    if a.layout != torch.strided or b.layout != torch.strided or any(isinstance(n, int) and n == 0 for n in a.shape):
        return a.layout == b.layout
    pairs = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all((not of_all and isinstance(n, int) and n == 1) or same_size(x, y) for n, x, y in pairs)


def storage_key(value: torch.Tensor) -> int:
    """Equal for two metadata values exactly when one aliases the other."""
    return value.untyped_storage()._cdata


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a metadata value (a tensor, or the tuple of a multi-output call)."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, tuple | list) else []


def operands_of(args: Any) -> list[Any]:
    """Every node among nested arguments, in order, repeats kept."""
    found: list[Any] = []

    def visit(value: Any) -> None:
        if isinstance(value, fx.Node):
            found.append(value)
        elif isinstance(value, tuple | list):
            for item in value:
                visit(item)
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, slice):
            visit((value.start, value.stop, value.step))
        elif isinstance(value, Region):
            return

    visit(args)
    return found
