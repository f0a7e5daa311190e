"""The nesting of a function's inputs and outputs, as plain data that needs no user class to print or compare.

Classes that torch's pytree knows (dataclass outputs of transformers and diffusers among them) are kept by their registered
name; the class is looked up only when a call has to build one. So are named tuples and `torch.return_types`, by module and name.
"""

import json
import sys
from collections import defaultdict, namedtuple
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree

from .errors import ArtifactError, CaptureError, first_line

_FACTORIES = ("list", "dict", "set", "tuple", "int", "float", "str", "bool")
_BUILTIN: dict[type, str] = {tuple: "tuple", list: "list", dict: "dict"}


@dataclass(frozen=True)
class Tree:
    """`kind` is "leaf", "tuple", "list", "dict" or "object"; `keys` are a dict's keys, `type_name` and `context` an object's."""

    kind: str
    children: tuple["Tree", ...] = ()
    keys: tuple[str | int, ...] = ()
    type_name: str = ""
    context: str = ""

    @property
    def num_leaves(self) -> int:
        return 1 if self.kind == "leaf" else sum(child.num_leaves for child in self.children)

    @staticmethod
    def from_spec(spec: pytree.TreeSpec) -> "Tree":
        """Raises CaptureError for a container class without a registered name, and for keys that text has no form for."""
        if spec.is_leaf():
            return LEAF
        children = tuple(Tree.from_spec(child) for child in _children(spec))
        kind = _BUILTIN.get(spec.type)  # type: ignore[arg-type]
        if kind == "dict":
            for key in spec.context:
                if not isinstance(key, str | int) or isinstance(key, bool):
                    raise CaptureError(f"a dict in the model's inputs or outputs has the key {key!r}: use strings or integers as keys")
            return Tree("dict", children, keys=tuple(spec.context))
        if kind is not None:
            return Tree(kind, children)
        named = named_tuple(spec)
        if named is not None:
            return Tree("object", children, type_name=_place_of(named), context=json.dumps(_field_names(named)))
        registered = pytree.SUPPORTED_SERIALIZED_TYPES.get(spec.type)  # type: ignore[arg-type]
        name = getattr(registered, "serialized_type_name", None)
        if not isinstance(name, str) or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
            raise CaptureError(
                f"the class {spec.type!r} in the model's inputs or outputs has no registered name: register it with "
                "torch.utils._pytree.register_pytree_node(..., serialized_type_name=...) or return a dict"
            )
        dump = registered.to_dumpable_context  # type: ignore[union-attr]
        try:
            context = json.dumps(dump(spec.context) if dump else spec.context)
        except (TypeError, ValueError, NotImplementedError) as error:
            raise CaptureError(
                f"the {name} in the model's inputs or outputs cannot be written ({error}): use a dict whose keys are strings or integers"
            ) from error
        return Tree("object", children, type_name=name, context=context)

    def to_spec(self) -> pytree.TreeSpec:
        """Raises ArtifactError when an object's class is not imported in this process, or its context is not one of that class."""
        if self.kind == "leaf":
            return pytree.treespec_leaf() if hasattr(pytree, "treespec_leaf") else pytree.LeafSpec()
        children = [child.to_spec() for child in self.children]
        builtin = {name: cls for cls, name in _BUILTIN.items()}.get(self.kind)
        if builtin is not None:
            return pytree.TreeSpec(builtin, list(self.keys) if self.kind == "dict" else None, children)
        named = named_tuple_class(self)
        if named is not None:
            return pytree.TreeSpec(namedtuple, named, children) if _is_plain(named) else pytree.TreeSpec(named, None, children)
        cls = _registered(self.type_name)
        if cls is None:
            raise ArtifactError(
                f"this program returns a {self.type_name}, which is not known in this process: import the module that defines it first"
            )
        load = pytree.SUPPORTED_SERIALIZED_TYPES[cls].from_dumpable_context
        try:
            context = json.loads(self.context)
            _refuse_foreign_factory(cls, context)
            return pytree.TreeSpec(cls, load(context) if load else context, children)
        except Exception as error:
            raise ArtifactError(f"this program has a {self.type_name} of unreadable context: {first_line(error)}") from error


LEAF = Tree("leaf")


def _registered(type_name: str) -> type | None:
    """The class of that name, where a module has registered it with torch; those of transformers' outputs are looked for there."""
    if type_name.startswith("transformers.modeling_outputs.") and type_name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
        with suppress(ImportError):
            import transformers.modeling_outputs  # noqa: F401 - registers its classes
    return pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE.get(type_name)


def _children(spec: pytree.TreeSpec) -> list[pytree.TreeSpec]:
    return spec.children() if callable(getattr(spec, "children", None)) else spec.children_specs


# --- named tuples ----------------------------------------------------------------------------------------------------------


def named_tuple(spec: pytree.TreeSpec) -> type | None:
    """The named tuple, or the torch.return_types, that `spec` is one of."""
    if spec.type is namedtuple:
        return spec.context
    return spec.type if getattr(spec.type, "__module__", "") == "torch.return_types" else None


def named_tuple_class(tree: Tree) -> type | None:
    """The class of that name in a module that is imported already, with the same fields; a program imports nothing."""
    module, _, name = tree.type_name.partition(":")
    found = _names_in(module).get(name)
    if not isinstance(found, type) or not issubclass(found, tuple) or not (_is_plain(found) or module == "torch.return_types"):
        return None
    return found if json.dumps(_field_names(found)) == tree.context else None


def _names_in(module: str) -> dict[str, Any]:
    return getattr(sys.modules.get(module), "__dict__", {})


def _is_plain(cls: type) -> bool:
    return pytree.is_namedtuple_class(cls)


def _field_names(cls: Any) -> list[str]:
    return list(getattr(cls, "_fields", None) or getattr(cls, "__match_args__", ()))


def _place_of(cls: type) -> str:
    """`module:Class`. Raises CaptureError for a class that is not found there."""
    if _names_in(cls.__module__).get(cls.__qualname__) is not cls:
        raise CaptureError(
            f"the named tuple {cls.__qualname__} in the model's inputs or outputs is not found in module {cls.__module__}: "
            "define it at the top level of a module, or return a tuple or dict"
        )
    return f"{cls.__module__}:{cls.__qualname__}"


def flat(values: int) -> Tree:
    """A plain tuple of `values` leaves."""
    return Tree("tuple", tuple(LEAF for _ in range(values)))


def is_call(tree: Tree) -> bool:
    """Whether `tree` nests the arguments of a call: a tuple of the positional ones, a dict of the named ones."""
    if tree.kind != "tuple" or [child.kind for child in tree.children] != ["tuple", "dict"]:
        return False
    return all(isinstance(name, str) for name in tree.children[1].keys)


def unflatten(spec: pytree.TreeSpec, leaves: list[Any]) -> Any:
    """The nested value that `spec` describes, over `leaves`.

    Raises:
        ArtifactError: a class in it builds none from these.
    """
    try:
        return pytree.tree_unflatten(leaves, spec)
    except Exception as error:
        raise ArtifactError(f"the program's outputs do not fit the classes that they are returned in: {first_line(error)}") from error


def _refuse_foreign_factory(cls: type, context: Any) -> None:
    """torch would import the module that a defaultdict's text names; a program imports nothing."""
    if cls is not defaultdict or not isinstance(context, dict):
        return
    module, name = context.get("default_factory_module"), context.get("default_factory_name")
    if module != "builtins" or name not in _FACTORIES:
        raise ValueError(f"its missing items are made by {module}.{name}, and a program calls none but {', '.join(_FACTORIES)}")
