"""From a Python call to the flat inputs of a program, with every mismatch said in one sentence.

The program was captured for one nesting of arguments, for dtypes, devices and static sizes, and for the constants among its
arguments. Symbols are bound by the first dim that is one, then checked against their ranges and everywhere else.
"""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from .errors import InputError
from .infer import contiguous_stride
from .program import Function, Program
from .region import dense_stride, memory_order
from .symbols import UNBOUNDED, Symbol, SymbolTable, hint
from .tree import Tree, named_tuple_class

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Parameter:
    """A parameter of the model's `forward`; `default` is REQUIRED where it has none."""

    name: str
    default: Any = REQUIRED
    keyword_only: bool = False


def parameters_of(forward: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The named parameters of `forward` (`*args` and `**kwargs` excluded)."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [p for p in inspect.signature(forward).parameters.values() if p.kind not in variadic]
    return tuple(Parameter(p.name, p.default, p.kind is inspect.Parameter.KEYWORD_ONLY) for p in named)


class Call:
    """Binds calls of one function of a program."""

    def __init__(self, program: Program, function: Function, parameters: Sequence[Parameter] = ()):
        self.parameters = tuple(parameters)
        self._positional, self._keyword = function.in_tree.children
        arguments = function.signature().inputs
        names = _argument_names(self._positional, [a.name for a in arguments], self.parameters)
        self._names, self._leaf_names = names, [a.name for a in arguments]
        self._leaves = [_LeafCheck.of(argument.value, program.symbols) for argument in arguments]
        self._symbols = {symbol.name: symbol for symbol in program.symbols}
        written = set(function.signature().new_states)
        self._written = [index for index, argument in enumerate(arguments) if f"input:{argument.name}" in written]

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
        """The flat inputs of a call as the program takes them, and as the caller gave them.

        Raises:
            InputError: naming the argument, what was expected and what came.
        """
        leaves: list[Any] = []
        paths: list[str] = []
        for name, tree, value in self._arranged(args, kwargs):
            _flatten(tree, value, name, leaves, paths)
        inputs = self._checked(leaves, paths)
        self._check_written(leaves, paths)
        return inputs, leaves

    def bind_flat(self, leaves: Sequence[Any]) -> list[Any]:
        """The flat inputs of a call as the program takes them, from a value for each leaf, constants included.

        Raises:
            InputError: naming the argument, what was expected and what came.
        """
        names = self._leaf_names
        if len(leaves) != len(names):
            raise InputError(f"the function takes {len(names)} inputs, one for each of {', '.join(names) or 'none'}, not {len(leaves)}")
        return self._checked(leaves, names)

    def _checked(self, leaves: Sequence[Any], paths: Sequence[str]) -> list[Any]:
        sizes: dict[str, tuple[int, str]] = {}
        inputs = [check(value, path, sizes, self._symbols) for check, value, path in zip(self._leaves, leaves, paths, strict=True)]
        if len(sizes) < len(self._symbols):
            for check, value, path in zip(self._leaves, leaves, paths, strict=True):
                check.solve(value, path, sizes, self._symbols)
        if self._symbols:
            for check, value, path in zip(self._leaves, leaves, paths, strict=True):
                check.check_expressions(value, path, sizes)
        return inputs

    def _check_written(self, leaves: Sequence[Any], paths: Sequence[str]) -> None:
        """A write into one input is not seen by what reads another, so the two may not lie in the same memory."""
        for written in self._written:
            for index, other in enumerate(leaves):
                if index != written and isinstance(other, torch.Tensor) and _overlap(leaves[written], other):
                    raise InputError(f"argument {paths[written]} is written to and shares memory with {paths[index]}: pass a copy of one")

    def _arranged(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tree, Any]]:
        """(name, tree, value) of each captured argument, however it was passed."""
        captured = [
            *zip(self._names, self._positional.children, strict=True),
            *zip(self._keyword.keys, self._keyword.children, strict=True),
        ]
        given = self._by_name(args, kwargs)
        arranged = []
        for name, tree in captured:
            if name in given:
                arranged.append((str(name), tree, given.pop(name)))
                continue
            default = next((p.default for p in self.parameters if p.name == name), REQUIRED)
            if default is REQUIRED:
                raise InputError(f"argument {name} is missing: the model was captured with it")
            arranged.append((str(name), tree, default))
        for name, value in given.items():
            default = next((p.default for p in self.parameters if p.name == name), REQUIRED)
            if default is REQUIRED:
                known = ", ".join(str(name) for name, _ in captured)
                raise InputError(f"argument {name} was not there when the model was captured, which takes {known or 'no arguments'}")
            if not _equal_constants(value, default):
                raise InputError(
                    f"argument {name} is {_shown(value)}, but the model was captured with its default {_shown(default)}: "
                    f"compile with an example of {name}"
                )
        return arranged

    def _by_name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        order = [p.name for p in self.parameters if not p.keyword_only]
        order += [name for name in self._names if name not in order]
        if len(args) > len(order):
            raise InputError(f"the call has {len(args)} positional arguments, but the model takes {len(order)} ({', '.join(order)})")
        given = dict(zip(order, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"argument {name} is given twice, by position and by name")
            given[name] = value
        return given


def _argument_names(tree: Tree, leaf_names: list[str], parameters: Sequence[Parameter]) -> list[str]:
    """A name for each positional argument: the parameter's, else that of its first leaf, else its number."""
    positional = [p for p in parameters if not p.keyword_only]
    names, leaf = [], 0
    for index, child in enumerate(tree.children):
        known = positional[index].name if index < len(positional) else None
        fallback = leaf_names[leaf] if child.kind == "leaf" else f"args[{index}]"
        names.append(known or fallback)
        leaf += child.num_leaves
    return names


# --- nesting ---------------------------------------------------------------------------------------------------------------


def _flatten(tree: Tree, value: Any, path: str, leaves: list[Any], paths: list[str]) -> None:
    if tree.kind == "leaf":
        if isinstance(value, tuple | list | dict):
            raise InputError(f"argument {path} is a {type(value).__name__}, but the model was captured with a single value there")
        leaves.append(value)
        paths.append(path)
        return
    for child, item, label in zip(tree.children, *_items(tree, value, path), strict=True):
        _flatten(child, item, label, leaves, paths)


def _items(tree: Tree, value: Any, path: str) -> tuple[list[Any], list[str]]:
    """The children of `value` in the tree's order, and the path of each."""
    if tree.kind == "object":
        return _object_items(tree, value, path)
    expected = {"tuple": tuple, "list": list, "dict": dict}[tree.kind]
    if type(value) is not expected:
        raise InputError(f"argument {path} is a {type(value).__name__}, but the model was captured with a {tree.kind} there")
    if tree.kind == "dict":
        if set(value) != set(tree.keys):
            raise InputError(f"argument {path} has the keys {_listed(value)}, but the model was captured with {_listed(tree.keys)}")
        return [value[key] for key in tree.keys], [f"{path}[{key!r}]" for key in tree.keys]
    if len(value) != len(tree.children):
        raise InputError(f"argument {path} has {len(value)} items, but the model was captured with {len(tree.children)}")
    return list(value), [f"{path}[{index}]" for index in range(len(value))]


def _object_items(tree: Tree, value: Any, path: str) -> tuple[list[Any], list[str]]:
    named = named_tuple_class(tree)
    if named is not None and type(value) is named:
        return list(value), [f"{path}[{index}]" for index in range(len(value))]
    cls = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(tree.type_name)
    if cls is None or type(value) is not cls:
        raise InputError(f"argument {path} is a {type(value).__name__}, but the model was captured with a {tree.type_name} there")
    children, context = pytree.SUPPORTED_NODES[cls].flatten_fn(value)
    dump = pytree.SUPPORTED_SERIALIZED_TYPES[cls].to_dumpable_context
    if json.dumps(dump(context) if dump else context) != tree.context or len(children) != len(tree.children):
        raise InputError(f"argument {path} is a {tree.type_name} with other fields than the model was captured with")
    return list(children), [f"{path}[{index}]" for index in range(len(children))]


def _listed(keys: Any) -> str:
    return ", ".join(sorted(repr(key) for key in keys)) or "none"


# --- leaves ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LeafCheck:
    """What a leaf must be: a tensor of this type, a size, or one constant."""

    kind: str  # "tensor", "size" or "constant"
    constant: Any = None
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    shape: tuple[Any, ...] = ()  # ints, symbol names, or SymInts that are expressions
    texts: tuple[str, ...] = ()
    order: tuple[int, ...] | None = None  # dims by falling stride, None where the memory has gaps or overlaps
    stride: tuple[Any, ...] = ()
    env: SymbolTable | None = None
    exact: bool = False  # whether no size and no stride is symbolic

    @staticmethod
    def of(value: Any, symbols: SymbolTable) -> "_LeafCheck":
        if isinstance(value, torch.Tensor):
            return _LeafCheck(
                "tensor",
                dtype=value.dtype,
                device=value.device,
                shape=tuple(_dim(size, symbols) for size in value.shape),
                texts=tuple(symbols.text(size) for size in value.shape),
                order=_memory_order(value),
                stride=tuple(value.stride()),
                env=symbols,
                exact=all(isinstance(n, int) for n in (*value.shape, *value.stride())),
            )
        if isinstance(value, torch.SymInt):
            return _LeafCheck("size", shape=(_dim(value, symbols),), texts=(symbols.text(value),), env=symbols)
        return _LeafCheck("constant", constant=value)

    def __call__(self, value: Any, path: str, sizes: dict[str, tuple[int, str]], symbols: Mapping[str, Any]) -> Any:
        """`value` as the program takes it: laid out in memory as at capture."""
        if self.kind == "constant":
            if not _equal_constants(value, self.constant):
                captured = _shown(self.constant)
                raise InputError(
                    f"argument {path} is {_shown(value)}, but the model was captured for {captured}: give {captured}, or compile it again"
                )
            return value
        if self.kind == "size":
            if type(value) is not int:
                raise InputError(f"argument {path} is {_shown(value)}, but the model takes an int there")
            self._bind_sizes((value,), path, sizes, symbols)
            return value
        if self.exact and self._is_exact(value):
            return value
        self._check_type(value, path)
        self._bind_sizes(value.shape, path, sizes, symbols)
        return self._laid_out(value, path)

    def _is_exact(self, value: Any) -> bool:
        """Whether `value` is what was captured to the last stride, as it is in most calls: nothing is left to check or to copy."""
        return (
            type(value) is torch.Tensor
            and not value.is_nested  # which has no shape
            and value.shape == self.shape
            and value.dtype is self.dtype
            and value.layout is torch.strided
            and value.stride() == self.stride
            and value.device.type == self.device.type  # type: ignore[union-attr]
            and not (value.is_conj() or value.is_neg())
        )

    def _check_type(self, value: Any, path: str) -> None:
        if not isinstance(value, torch.Tensor):
            raise InputError(f"argument {path} is {_shown(value)}, but the model takes a tensor {self._type()} there")
        if value.dtype != self.dtype:
            raise InputError(f"argument {path} is {value.dtype}, but the model was captured for {self.dtype}")
        if value.device.type != self.device.type:  # type: ignore[union-attr]
            raise InputError(f"argument {path} is on {value.device}, but the model was captured for {self.device}")
        if value.is_nested and value.layout == torch.strided:  # the one whose layout says nothing, and which has no sizes
            raise InputError(f"argument {path} is a nested tensor, but the model takes {self._type()}: call .to_padded_tensor(0.0) on it")
        if value.layout != torch.strided:
            raise InputError(f"argument {path} has layout {value.layout}, but the model takes dense tensors: call .to_dense() on it")
        if value.dim() != len(self.shape):
            raise InputError(f"argument {path} has {value.dim()} dims, {list(value.shape)}, but the model takes {self._type()}")

    def _bind_sizes(self, shape: Sequence[int], path: str, sizes: dict[str, tuple[int, str]], symbols: Mapping[str, Any]) -> None:
        for dim, (size, expected) in enumerate(zip(shape, self.shape, strict=True)):
            here = f"{path} dim {dim}" if self.kind == "tensor" else path
            if isinstance(expected, int):
                if size != expected:
                    raise InputError(f"argument {here} is {size}, but the model was captured for {expected}, as in {self._type()}")
            elif isinstance(expected, str):
                _check_range(symbols[expected], size, f"argument {here} is {size}")
                first, where = sizes.setdefault(expected, (size, here))
                if first != size:
                    raise InputError(f"argument {here} is {size}, but {expected} is {first} already, from {where}")

    def solve(self, value: Any, path: str, sizes: dict[str, tuple[int, str]], symbols: Mapping[str, Any]) -> None:
        """Binds a symbol that stands in no dim alone from a size k*symbol + c."""
        for dim, expected in enumerate(self.shape):
            if isinstance(expected, int | str):
                continue
            actual = int(value.shape[dim] if self.kind == "tensor" else value)
            affine = _affine(expected, self.env, sizes)
            if affine is None:
                continue
            name, factor, offset = affine
            here = f"{path} dim {dim}" if self.kind == "tensor" else path
            size, rest = divmod(actual - offset, factor)
            if rest:
                raise InputError(f"argument {here} is {actual}, but the model takes {self.texts[dim]} there, for an integer {name}")
            _check_range(symbols[name], size, f"argument {here} is {actual}, which makes {name} {size}")
            sizes[name] = size, here

    def check_expressions(self, value: Any, path: str, sizes: Mapping[str, tuple[int, str]]) -> None:
        """Sizes that are expressions of symbols, such as 2*batch, once the symbols are bound."""
        for dim, expected in enumerate(self.shape):
            if isinstance(expected, int | str):
                continue
            actual = value.shape[dim] if self.kind == "tensor" else value
            wanted = _evaluate(expected, self.env, sizes)
            if wanted is not None and wanted != actual:
                raise InputError(f"argument {path} dim {dim} is {actual}, but {self.texts[dim]} is {wanted}")

    def _laid_out(self, value: torch.Tensor, path: str) -> torch.Tensor:
        """The program's operations rely on the strides seen at capture; other memory, or a lazy conjugate, is copied into that form."""
        value = value.resolve_conj().resolve_neg()
        stride = self.stride if self.order is None else dense_stride(value.shape, self.order)
        if all(n <= 1 or a == b for n, a, b in zip(value.shape, value.stride(), stride, strict=True)):
            return value
        if any(not isinstance(step, int) for step in stride):
            return value
        if any(n > 1 and step == 0 for n, step in zip(value.shape, stride, strict=True)):
            raise InputError(
                f"argument {path} was captured as an expanded tensor, whose elements stand for many: "
                "expand it as the example was, or compile with a contiguous example"
            )
        return torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value.detach())

    def _type(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{', '.join(self.texts)}]" if self.kind == "tensor" else f"size {self.texts[0]}"


def _dim(size: Any, symbols: SymbolTable) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    text = symbols.text(size)
    return text if text in symbols else int(text) if text.isdigit() else size


def _check_range(symbol: Symbol, size: int, found: str) -> None:
    if not symbol.low <= size <= symbol.high:
        legal = f"is at least {symbol.low}" if symbol.high >= UNBOUNDED else f"ranges from {symbol.low} to {symbol.high}"
        raise InputError(f"{found}, but {symbol.name} {legal}")


def _known(symbols: SymbolTable, sizes: Mapping[str, tuple[int, str]]) -> dict[Any, int]:
    return {symbols.size(name).node.expr: bound for name, (bound, _) in sizes.items()}


def _affine(size: torch.SymInt, symbols: SymbolTable | None, sizes: Mapping[str, tuple[int, str]]) -> tuple[str, int, int] | None:
    """(name, k, c) where `size` is k*name + c and `name` the one symbol in it that is not bound yet; else None."""
    assert symbols is not None
    expr = size.node.expr.xreplace(_known(symbols, sizes))
    if len(expr.free_symbols) != 1:
        return None
    (unknown,) = expr.free_symbols
    factor = expr.coeff(unknown)
    offset = expr - factor * unknown
    name = next((symbol.name for symbol in symbols if symbols.size(symbol.name).node.expr == unknown), None)
    if name is None or not (factor.is_Integer and offset.is_Integer and factor != 0):
        return None
    return name, int(factor), int(offset)


def _evaluate(size: torch.SymInt, symbols: SymbolTable | None, sizes: Mapping[str, tuple[int, str]]) -> int | None:
    assert symbols is not None
    value = size.node.expr.xreplace(_known(symbols, sizes))
    return int(value) if value.is_Integer else None


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the addresses from the first to the last element of each meet."""
    if a.numel() == 0 or b.numel() == 0 or a.device != b.device or a.is_meta:
        return False
    (begin_a, end_a), (begin_b, end_b) = _addresses(a), _addresses(b)
    return begin_a < end_b and begin_b < end_a


def _addresses(value: torch.Tensor) -> tuple[int, int]:
    begin = value.data_ptr()
    last = sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return begin, begin + (last + 1) * value.element_size()


def _memory_order(value: torch.Tensor) -> tuple[int, ...] | None:
    """Dims from the slowest to the fastest if the tensor is dense, else None. Sizes are taken at their hints."""
    shape, stride = [hint(n) for n in value.shape], [hint(n) for n in value.stride()]
    order = tuple(memory_order(value))
    dense = dense_stride(shape, order)
    if tuple(stride) == contiguous_stride(shape):
        return tuple(range(len(shape)))
    return order if all(n == 1 or a == b for n, a, b in zip(shape, stride, dense, strict=True)) else None


def _equal_constants(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    return type(a) is type(b) and bool(a == b or a != a and b != b)


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor {value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
