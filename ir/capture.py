"""From an `nn.Module` or an `ExportedProgram` to a Program.

torch.export traces the module. Its graph is rebuilt node by node in the program's own symbols, which gives metadata whose fake
storages show aliasing, canonical arguments and sizes under the user's names. Composites (linear, attention, norms, convolutions)
stay whole, and what the export left undecided is decided on the way. A graph that needs more than that (writes that others see,
dynamic sizes, control flow) goes through torch's `run_decompositions({})` first, which traces it a second time.
"""

import functools
import io
import logging
import os
import sys
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .build import add_call, add_placeholder, add_weight, set_outputs
from .calls import GETITEM, is_assertion, is_mutating, is_pure, name_of, written_statistics
from .dtypes import check_dtypes
from .dynamic_shapes import misfit
from .errors import CaptureError, InputError
from .exportable_experts import advice_on_loop, exportable_experts
from .forks import new_rlock
from .functionalize import NotFunctional, functional_variant, instance_norm, is_ambiguous, take_apart
from .infer import InferenceError, fake_like, has_gaps, same_type, storage_key, tensors_of
from .parser import is_symbol_name
from .program import Function, Node, Program, Weight, Where
from .size_nodes import SizeNodes
from .symbols import UNBOUNDED, Symbol, SymbolTable, hint
from .tree import Tree
from .types import DTYPE_NAMES
from .where import PACKAGE_ROOT, TORCH_ROOT, relative_file, where_of


def capture(
    model: torch.nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
) -> Program:
    """The program that `model(*args, **kwargs)` runs, in the module's present train/eval mode. Weights are shared, not copied.

    `dynamic_shapes` is torch.export's: `{"x": {0: torch.export.Dim("batch", max=64)}}`.

    Raises:
        CaptureError: with every blocker found, the user's line for each, and what to do.
        InputError: the example inputs do not fit the module.
    """
    if not isinstance(model, torch.nn.Module):
        raise CaptureError(f"only an nn.Module is captured, not {_kind(model)}: wrap a function in a module whose forward calls it")
    if not isinstance(args, tuple):
        raise InputError(f"example inputs are a tuple of positional arguments, not a {type(args).__name__}: write (x,)")
    args, kwargs = _told_apart(args, kwargs or {})
    if dynamic_shapes:
        args, kwargs = pytree.tree_map_only(torch.Tensor, _without_gaps, (args, kwargs))
    try:
        with _undisturbed(), exportable_experts(model):
            exported = torch.export.export(model, args, kwargs or {}, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise _explain(error, model, args, kwargs or {}, dynamic_shapes) from error
    return from_exported(exported, dim_names=_dim_names(model, args, kwargs or {}, dynamic_shapes))


def from_exported(exported: ExportedProgram, dim_names: Mapping[tuple[int, int], str] | None = None) -> Program:
    """The program of an ExportedProgram; `dim_names` maps (input leaf, dim) to a symbol's name."""
    with _undisturbed():
        refused = None
        if _is_plain(exported):
            try:
                return _Importer(exported, dim_names or {}).program()
            except CaptureError as error:
                refused = error  # torch may still make it functional; what it cannot is an error below
        try:
            functional = exported.run_decompositions({})
        except Exception as error:
            reason = f"torch cannot make the exported program functional ({type(error).__name__}: {_first_line(error)})"
            advice = "check that no input that is written to shares memory with another"
            if refused is not None and not isinstance(refused, NotFunctional):
                raise refused from error
            raise CaptureError(f"{reason}: {advice}") from error
    return _Importer(functional, dim_names or {}).program()


def _is_plain(exported: ExportedProgram) -> bool:
    """Whether weights are plain tensors and every call is an operation of the IR."""
    weights = [*exported.state_dict.values(), *exported.constants.values()]
    if any(map(is_traceable_wrapper_subclass, weights)):
        return False
    return all(node.op != "get_attr" and (node.op != "call_function" or _is_known(node)) for node in exported.graph.nodes)


# Operators that a library registers, and what of ours they are.
_SAME_AS = {"transformers.grouped_mm_fallback.default": torch.ops.gw.grouped_mm.default}


def _known(target: Any) -> Any:
    return _SAME_AS.get(str(target), target)


def _is_known(node: Node) -> bool:
    try:
        return bool(name_of(_known(node.target)))
    except KeyError:
        return False


def _told_apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same inputs, with a tensor that is given twice as two tensors: torch.export would take the two inputs for one."""
    seen: set[int] = set()

    def apart(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or id(leaf) not in seen:
            seen.add(id(leaf))
            return leaf
        return leaf.detach()

    return pytree.tree_map(apart, (args, kwargs))


def _without_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """A dense copy of every other column and the like: how far apart they lie is no function of the dynamic sizes."""
    if tensor.layout != torch.strided or not has_gaps(tensor.shape, tensor.stride()):
        return tensor
    return tensor.detach().clone()


_TURN = new_rlock()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Tracing may draw random numbers and warn; the caller's generator, filters and grad mode stay as they were.

    Threads take turns: torch keeps the modes in which it traces for the whole process, and so does Python the filters of warnings.
    """
    with _TURN, torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad(), _QUIET:
        warnings.simplefilter("ignore")
        yield


_NOISY_LOGGERS = ("torch", "torch.export", "torch.export._draft_export", "torch.fx.experimental.symbolic_shapes")


class _Quiet:
    """torch logs failures that our errors say, and prints the graph beside some; with TORCH_LOGS set it is left to.

    What the model itself writes to stderr comes out when it has been captured. Of captures within another the outer one silences.
    """

    def __init__(self) -> None:
        self._inside, self._restore = 0, ExitStack()
        self._held, self._failed = io.StringIO(), False

    def __enter__(self) -> None:
        self._inside += 1
        if self._inside > 1 or os.environ.get("TORCH_LOGS"):
            return
        self._held, self._failed = io.StringIO(), False
        self._restore.enter_context(redirect_stderr(self._held))
        for logger in map(logging.getLogger, _NOISY_LOGGERS):
            self._restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)

    def __exit__(self, kind: object, *exception: object) -> None:
        self._inside -= 1
        self._failed |= kind is not None
        if self._inside:
            return
        self._restore.close()
        if not self._failed:
            sys.stderr.write(self._held.getvalue())
            self._held = io.StringIO()


_QUIET = _Quiet()


@contextmanager
def _buffers_restored(model: torch.nn.Module) -> Iterator[None]:
    """A run of the real module may write its buffers; the user's module stays as it was."""
    saved = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in saved and saved[name].shape == buffer.shape:
                    buffer.copy_(saved[name])


class _Importer:
    """Rebuilds one exported graph as a Program."""

    def __init__(self, exported: ExportedProgram, dim_names: Mapping[tuple[int, int], str]):
        self.exported = exported
        self.dim_names = dim_names
        self.symbols = SymbolTable()
        self.sizes: dict[sympy.Symbol, sympy.Symbol] = {}
        self.weights: dict[str, Weight] = {}
        self.graph = fx.Graph()
        self.copies: dict[Node, Any] = {}
        self.blocked: set[Node] = set()  # calls without a copy: they, or what they need, have no place in the IR
        self.names: dict[int, list[Node]] = defaultdict(list)  # storage -> what stood for it in the exported graph

    def program(self) -> Program:
        signature = self.exported.graph_signature
        placeholders = [node for node in self.exported.graph.nodes if node.op == "placeholder"]
        specs = list(zip(placeholders, signature.input_specs, strict=True))
        inputs = [(node, spec) for node, spec in specs if spec.kind == InputKind.USER_INPUT]
        self._declare_symbols([node for node, _ in inputs])
        for node, spec in inputs:
            self._stands_for(node, add_placeholder(self.graph, _input_name(node), self._rebase(node, spec)))
        mutated = {*signature.buffers_to_mutate.values(), *self._trained_buffers()}
        for node, spec in specs:
            if spec.kind != InputKind.USER_INPUT:
                self._import_weight(node, spec, mutated)
        blockers = [problem for node in self.exported.graph.nodes if node.op == "call_function" for problem in self._import_call(node)]
        blockers += _nameless_types(self.graph)
        if blockers:
            raise CaptureError(_list_blockers(blockers))
        self._import_outputs()
        self._drop_unused()
        call_spec = self.exported.call_spec
        main = Function("main", self.graph, Tree.from_spec(call_spec.in_spec), Tree.from_spec(call_spec.out_spec))
        return Program([main], self.weights, self.symbols)

    def _declare_symbols(self, inputs: list[Node]) -> None:
        ranges = self.exported.range_constraints
        for leaf, node in enumerate(inputs):
            value = node.meta.get("val")
            sizes = list(value.shape) if isinstance(value, torch.Tensor) else [value]
            for dim, size in enumerate(sizes):
                if not isinstance(size, torch.SymInt):
                    continue
                for symbol in sorted(size.node.expr.free_symbols, key=str):
                    if symbol in self.sizes:
                        continue
                    given = self.dim_names.get((leaf, dim)) if len(size.node.expr.free_symbols) == 1 else None
                    name = given if given and given not in self.symbols else self._next_name()
                    bounds = ranges.get(symbol)
                    low, high = (0, UNBOUNDED) if bounds is None else (_bound(bounds.lower, 0), _bound(bounds.upper, UNBOUNDED))
                    low = min(low, _low_of(symbol, size.node.expr, ranges, low))
                    at_capture = _hint_of(symbol, size.node.shape_env)
                    self.sizes[symbol] = self.symbols.declare(Symbol(name, low, high, at_capture)).node.expr

    def _trained_buffers(self) -> Iterator[str]:
        """The buffers that calls write as running statistics, of which the export knows nothing."""
        buffers = self.exported.graph_signature.inputs_to_buffers
        for node in self.exported.graph.nodes:
            for written in written_statistics(node.target, node.args, node.kwargs).values():
                if written.name in buffers:
                    yield buffers[written.name]

    def _next_name(self) -> str:
        return next(name for k in range(len(self.symbols) + 1) if (name := f"s{k}") not in self.symbols)

    def _rebase(self, node: Node, spec: InputSpec) -> Any:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            is_dynamic = any(isinstance(size, torch.SymInt) for size in value.shape)
            if is_dynamic and has_gaps(map(hint, value.shape), map(hint, value.stride())):
                name = _input_name(node)
                raise CaptureError(
                    f"input {name} has dynamic sizes, and its example has gaps between its elements or elements that overlap: "
                    f"export with {name}.contiguous()"
                )
            return fake_like(self.symbols, value.dtype, map(self._size, value.shape), map(self._size, value.stride()), value.device)
        if isinstance(value, torch.SymInt):
            return self._size(value)
        return getattr(spec.arg, "value", value)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr.xreplace(self.sizes)
        return self.symbols.env.create_symintnode(expr, hint=size.node.hint)

    def _import_weight(self, node: Node, spec: InputSpec, mutated: set[str]) -> None:
        if spec.kind == InputKind.CUSTOM_OBJ or spec.kind == InputKind.TOKEN or spec.target is None:
            raise CaptureError(f"the model holds {node.name}, an object that is not a tensor: pass what it computes as an input")
        name = spec.target
        tensor = self.exported.state_dict.get(name)
        if tensor is None:
            tensor = self.exported.constants[name]
        if tensor.is_conj() or tensor.is_neg():
            raise CaptureError(f"weight {name} is a lazy conjugate: hold its .resolve_conj().resolve_neg() in the model instead")
        if name in mutated:
            self.weights[name] = Weight.of(name, tensor, "state")
            fake = fake_like(self.symbols, tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
            self._stands_for(node, add_placeholder(self.graph, name, fake, role="state"))
            return
        if not node.users:
            return
        kind = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}.get(spec.kind, "constant")
        self.weights[name] = Weight.of(name, tensor.detach() if kind == "parameter" else tensor, kind)
        self._stands_for(node, add_weight(self.graph, self.weights[name], self.symbols))

    def _import_call(self, node: Node) -> list[tuple[Where, str]]:
        """Adds the call; returns the reasons why it cannot be."""
        where = where_of(node)
        if not self.blocked.isdisjoint(node.all_input_nodes):  # the reason is listed already
            self.blocked.add(node)
            return []
        try:
            name_of(_known(node.target))
        except KeyError:
            self.blocked.add(node)
            return [(where, f"{node.target} has no place in the IR: replace it by ATen operations")]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.copies.get)
        if _is_tautology(node):
            return []
        check_dtypes(node.target, args, kwargs, where, self.graph)
        add = functools.partial(add_call, self.graph, self.symbols, where=where)
        try:
            if is_mutating(node.target):
                value = self._write(node, args, kwargs, add)
            elif written_statistics(node.target, args, kwargs):
                value = self._train(node, args, kwargs, add)
            else:
                value = self._rebuild(node.target, args, kwargs, add)
        except InferenceError as error:
            self.blocked.add(node)
            advice = f": {_SIZES_BY_VALUES}" if "data-dependent" in str(error) else ""
            return [(where, f"{name_of(node.target)} does not type-check: {error}{advice}")]
        except NotFunctional as error:  # no use to look further, torch may have to make it functional
            raise NotFunctional(_list_blockers([(where, str(error))])) from error
        self._stands_for(node, value)
        return []

    def _rebuild(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], add: Callable[..., Node]) -> Any:
        """The node of the result, or those of the results."""
        if target is GETITEM and isinstance(args[0], tuple | list):
            return args[0][args[1]]
        target = _known(target)
        if target is torch.ops.aten.lift_fresh_copy.default:  # what torch.tensor(..) inside a model is traced as
            target = torch.ops.aten.clone.default
        if not is_ambiguous(target):
            return add(target, args, kwargs)
        return take_apart(target, args, kwargs, self.symbols, add, functools.partial(self._node_of_size, add))

    def _node_of_size(self, add: Callable[..., Node], size: Any) -> Any:
        """The node of a size that an operation computes from those of its operands, or a number."""
        sizes = [node for node in self.graph.nodes if isinstance(node.meta["val"], torch.SymInt)]
        known = SizeNodes([*sizes, *(node for node in self.graph.nodes if node.op == "placeholder")])
        if not known.knows(size):
            raise NotFunctional("it computes a size that the inputs do not tell")
        return known.made(size, add)

    def _write(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], add: Callable[..., Node]) -> Any:
        """The functional variant of a write to memory that nothing reads later by another name."""
        written, variant = node.args[0] if node.args else None, functional_variant(node.target)
        if node.target is torch.ops.aten.detach_.default:
            return args[0]  # it changes what autograd sees, and no value
        if variant is None or not isinstance(written, Node) or written.op == "placeholder" or self._is_read_elsewhere(written, node):
            raise NotFunctional(f"{name_of(node.target)} writes to what is read elsewhere")
        new = self._rebuild(variant, args, kwargs, add)
        if not same_type(args[0].meta["val"], new.meta["val"]):
            raise NotFunctional(f"{name_of(node.target)} converts what it writes")
        self._stands_for(written, new)
        return new

    def _train(self, node: Node, args: tuple[Any, ...], kwargs: dict[str, Any], add: Callable[..., Node]) -> Node:
        """The functional form of a norm that writes its running statistics; later readers of these get the new ones."""
        if node.target is not torch.ops.aten.instance_norm.default:
            raise NotFunctional(f"{name_of(node.target)} writes its running statistics: call batch_norm or instance_norm instead")
        value, news = instance_norm(args, kwargs, add)
        for name, written in written_statistics(node.target, node.args, node.kwargs).items():
            if self.copies[written].op == "get_attr":
                raise NotFunctional(f"{name_of(node.target)} writes to {self.copies[written].target}: register it as a buffer")
            if self._is_read_elsewhere(written, node):
                raise NotFunctional(f"{name_of(node.target)} writes to what is read elsewhere")
            self._stands_for(written, news[name])
        return value

    def _is_read_elsewhere(self, written: Node, write: Node) -> bool:
        """Whether by another name a caller holds the memory of `written`, or a call after `write` reads it."""
        (memory,) = map(storage_key, tensors_of(self.copies[written].meta["val"]))
        names = self.names[memory]
        return any(name is not written and (name.op != "call_function" or any(user > write for user in name.users)) for name in names)

    def _stands_for(self, node: Node, value: Any) -> None:
        """Notes that `value`, a rebuilt node or those of several results, is `node`, and which memory `node` names."""
        self.copies[node] = value
        for part in value if isinstance(value, tuple | list) else [value]:
            for tensor in tensors_of(part.meta["val"]):
                self.names[storage_key(tensor)].append(node)

    def _drop_unused(self) -> None:
        """Removes calls and weights that nothing needs, as parts of what was taken apart may be."""
        for node in reversed(list(self.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                del self.weights[str(node.target)]
            if not node.users and (node.op == "get_attr" or (node.op == "call_function" and is_pure(node))):
                self.graph.erase_node(node)
        calls = [node for node in self.graph.nodes if node.op == "call_function"]
        for index, node in enumerate(calls):
            node.meta["origin"] = (index,)

    def _import_outputs(self) -> None:
        specs = self.exported.graph_signature.output_specs
        leaves = list(self.exported.graph.output_node().args[0])
        user, states, names = [], [], []
        for spec, leaf in zip(specs, leaves, strict=True):
            value = self.copies[leaf] if isinstance(leaf, fx.Node) else leaf
            if spec.kind == OutputKind.BUFFER_MUTATION:
                states.append(value)
                names.append(spec.target)
            elif spec.kind == OutputKind.USER_INPUT_MUTATION:
                states.append(value)
                names.append(f"input:{spec.target}")
            elif spec.kind == OutputKind.USER_OUTPUT:
                user.append(value)
            else:
                raise CaptureError(
                    f"the exported program has an output of kind {spec.kind.name}, which only training needs: export for inference"
                )
        for node, spec in zip(self.exported.graph.nodes, self.exported.graph_signature.input_specs, strict=False):
            name = f"input:{spec.arg.name}" if spec.kind == InputKind.USER_INPUT else str(spec.target)
            if name not in names and isinstance(new := self.copies.get(node), Node) and new.op == "call_function":  # written by `_train`
                states.append(new)
                names.append(name)
        set_outputs(self.graph, [*user, *states], tuple(names))


def _nameless_types(graph: fx.Graph) -> list[tuple[Where, str]]:
    """For each dtype that text has no name for, its first tensor."""
    found: dict[torch.dtype, tuple[Where, str]] = {}
    for node in graph.nodes:
        for dtype in (tensor.dtype for tensor in tensors_of(node.meta.get("val"))):
            if dtype not in DTYPE_NAMES:
                reason = f"{node.target} is {dtype}, which has no place in the IR: convert it to another dtype"
                found.setdefault(dtype, (node.meta.get("where") or Where(), reason))
    return list(found.values())


def _low_of(symbol: sympy.Symbol, size: sympy.Expr, ranges: Mapping[Any, Any], low: int) -> int:
    """The least `symbol` by the range of `size`, k*symbol + c: where 4*batch is declared, torch says from 2 of batch itself."""
    factor = size.coeff(symbol)
    offset = size - factor * symbol
    if size == symbol or size not in ranges or not (factor.is_Integer and offset.is_Integer and factor > 0):
        return low
    return max(-((int(offset) - _bound(ranges[size].lower, 0)) // int(factor)), 0)


def _hint_of(symbol: sympy.Symbol, env: Any) -> int:
    hints = getattr(env, "backed_var_to_val", None)  # torch 2.11 calls it var_to_val
    return int((env.var_to_val if hints is None else hints)[symbol])


def _input_name(node: Node) -> str:
    return str(node.target)


def _is_tautology(node: Node) -> bool:
    # Exported graphs assert dtype and device on every cast; the IR's own metadata states and verifies the same.
    return is_assertion(node.target) and "_assert_tensor_metadata" in str(node.target)


def _bound(value: Any, unbounded: int) -> int:
    return int(value) if isinstance(value, sympy.Integer | int) and abs(int(value)) < UNBOUNDED else unbounded


# --- names of dims ---------------------------------------------------------------------------------------------------------


def _dim_names(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> dict[tuple[int, int], str]:
    """(input leaf, dim) -> the name of the `Dim` that the user gave there."""
    if not dynamic_shapes:
        return {}
    try:
        import inspect

        if isinstance(dynamic_shapes, Mapping):
            bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
            pairs = [(value, dynamic_shapes.get(name)) for name, value in bound.items()]
        else:
            pairs = list(zip([*args, *kwargs.values()], dynamic_shapes, strict=False))
    except TypeError:
        return {}
    names: dict[tuple[int, int], str] = {}
    leaf = 0

    def visit(value: Any, spec: Any) -> None:
        nonlocal leaf
        if isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, spec.get(key) if isinstance(spec, Mapping) else None)
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                visit(item, spec[index] if isinstance(spec, tuple | list) and index < len(spec) else None)
        else:
            if isinstance(value, torch.Tensor):
                dims = dict(enumerate(spec)) if isinstance(spec, tuple | list) else spec or {}
                for dim, given in dims.items():
                    label = getattr(getattr(given, "root", given), "__name__", None)  # 2*batch is named by its batch
                    if isinstance(label, str) and is_symbol_name(label):
                        names[leaf, dim] = label
            leaf += 1

    for value, spec in pairs:
        visit(value, spec)
    return names


# --- failures --------------------------------------------------------------------------------------------------------------


_SIZES_BY_VALUES = (
    "a size depends on tensor values in a way that cannot be followed, as numbers of rows that experts have do: compute all rows, and put "
    "zeros where there are none"
)
_BY_VALUES = "control flow depends on tensor values: use torch.where, or make the value an input"


def _kind(model: object) -> str:
    return f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"


def _unready(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """What must be done to the model or its inputs before any capture; a call to find out more would give lazy weights their sizes."""
    lazy = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if is_lazy(tensor)]
    if lazy:
        return f"weight {lazy[0]} has no shape before the model's first call: call the model once, then compile it"
    if any(isinstance(leaf, torch.Tensor) and leaf.is_nested for leaf in pytree.tree_leaves((args, kwargs))):
        return "an input is a nested tensor, which no program can hold: pad it, and pass lengths or a mask"
    return None


def _explain(error: Exception, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> Exception:
    """What stopped torch.export: `dynamic_shapes` or the example inputs if they do not fit, else every blocker."""
    wrong = misfit(model, args, kwargs, dynamic_shapes) or _unready(model, args, kwargs)
    if wrong is not None:
        return InputError(wrong)
    try:
        with _undisturbed(), _buffers_restored(model):
            output = model(*args, **kwargs)
    except Exception as eager:
        return InputError(f"the model itself fails on the example inputs ({type(eager).__name__}: {_first_line(eager)}): fix those first")
    blockers = _blockers(model, args, kwargs, dynamic_shapes)
    if not blockers:
        blockers = [(Where("", 0), _unknown_output(name)) for name in _unknown_outputs(output)]
    if not blockers:
        blockers = [_raised(error)]
    return CaptureError(_list_blockers(blockers))


def _raised(error: Exception) -> tuple[Where, str]:
    """Where torch.export stopped and why, in its words unless that is control flow by tensor values."""
    reason = f"{type(error).__name__}: {_first_line(error)}"
    if isinstance(error, GuardOnDataDependentSymNode):
        reason = f"{advice_on_loop(_modules_of(error)) or _BY_VALUES} ({_first_line(error)})"
    elif "Couldn't swap" in reason:
        reason = f"a layer is converted to another dtype or device in forward: convert it before, and leave the call out ({reason})"
    return Where(*_traceback_frame(error)), reason


def _modules_of(error: BaseException) -> list[torch.nn.Module]:
    """The modules whose methods were running, innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [frame.f_locals.get("self") for frame in reversed(frames)]
    return [module for module in found if isinstance(module, torch.nn.Module)]


def _unknown_outputs(output: Any) -> list[str]:
    """The types in a model's output that are neither values nor containers that torch knows."""
    known = (torch.Tensor, int, float, complex, str, torch.dtype, torch.device, type(None))
    return sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(output) if not isinstance(leaf, known)})


def _unknown_output(name: str) -> str:
    cache = "call it with use_cache=False (in example_kwargs)" if "Cache" in name else "return its tensors"
    return f"the model returns a {name}, a type that torch.export does not know: {cache}, or register {name} with torch's pytree"


def _blockers(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> list[tuple[Where, str]]:
    """Everything that torch's draft export had to guess, which is what the strict one refuses."""
    advice = {
        "DATA_DEPENDENT_ERROR": _BY_VALUES,
        "GUARD_ADDED": "the code fixes a size that was declared dynamic: give that size, or widen the code",
        "MISSING_FAKE_KERNEL": "a custom operator has no fake kernel: add one with torch.library.register_fake",
        "MISMATCHED_FAKE_KERNEL": "a custom operator's fake kernel disagrees with the real one: mend it",
    }
    try:
        with _undisturbed(), _buffers_restored(model):
            draft: Any = torch.export.draft_export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception:
        return []
    report, found = getattr(draft, "_report", None), []
    for failure in getattr(report, "failures", ()):
        stack = failure.data.get("user_stack") or failure.data.get("stack") or []
        frames = [(frame.get("filename"), frame.get("line")) for frame in stack if isinstance(frame, dict)]
        file, line = _innermost_user_frame(frames, getattr(report, "str_to_filename", {}))
        expression = failure.data.get("expr") or failure.data.get("op") or ""
        found.append((Where(file, line), f"{advice.get(failure.failure_type.name, failure.failure_type.name)} ({expression})"))
    return found


def _innermost_user_frame(frames: list[tuple[Any, Any]], names: Mapping[Any, str]) -> tuple[str, int]:
    """The last frame outside torch. Files are numbered once a process, so names met earlier are in torch's own table."""
    table = getattr(torch._logging.structured, "INTERN_TABLE", {})
    names = {**{index: name for name, index in table.items()}, **names}
    for file, line in reversed(frames):
        name = str(names.get(file, ""))
        if name and not os.path.abspath(name).startswith(TORCH_ROOT):
            return relative_file(name), int(line)
    return "", 0


def _traceback_frame(error: BaseException) -> tuple[str, int]:
    place = ("", 0)
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if os.path.exists(file) and not os.path.abspath(file).startswith((TORCH_ROOT, PACKAGE_ROOT + os.sep + "ir")):
            place = (relative_file(file), line)
    return place


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _list_blockers(blockers: list[tuple[Where, str]]) -> str:
    unique = list(dict.fromkeys((str(where), reason) for where, reason in blockers))
    if len(unique) == 1:
        place, reason = unique[0]
        return f"the model cannot be captured{', at ' + place if place else ''}: {reason}"
    lines = [f"  {place or 'unknown line'}: {reason}" for place, reason in unique]
    return f"the model cannot be captured for {len(unique)} reasons:\n" + "\n".join(lines)
