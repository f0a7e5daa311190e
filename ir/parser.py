"""Text to Program: a small grammar of our own, which evaluates nothing.

    program   = "graphwright" INT { symbol | weight | function | schedule | pipeline }
    symbol    = "symbol" NAME "in" "[" INT "," (INT | "inf") "]" "hint" INT
    weight    = "weight" WEIGHT ":" tensor ("parameter" | "added" | "buffer" | "constant" | "state" | "record") DIGEST
    function  = "function" NAME "{" "takes" tree "gives" tree { input } { call } return "}"
    input     = ("input" | "state") VALUE (":" type | "=" literal)
    call      = VALUE "=" NAME "(" [argument {"," argument}] ")" [":" type] [comment]
    region    = VALUE "=" "gw.sliced" "(" [argument {"," argument}] ")" "in_dims=" list "out_dims=" list "count=" literal
                ["units=" literal] ["orders=" list] [":" type] "{" [comment] { input } { call } return "}"
    argument  = [NAME "="] literal          literal = VALUE | WEIGHT | number | string | list | keyword | dtype | device(..) ...
    return    = "return" [literal {"," literal}] ["state" NAME "=" literal {"," NAME "=" literal}]
    tensor    = DTYPE "[" [size {"," size}] "]" ["strides" "[" size {"," size} "]"] ["on" device]
    size      = expression over symbol names with + - * // % Min(size, size) Max(size, size)
    comment   = "#" ["[" INT {"," INT} "]"] [FILE ":" LINE] [MODULE]      (provenance; any other comment is ignored)

Types after calls may be left out; where given they must be what the operation computes.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import fx

from .build import add_call, add_placeholder, add_weight, set_outputs
from .calls import is_mutating, target_of
from .errors import ParseError, first_line, printable
from .infer import InferenceError, contiguous_stride, fake_like
from .printer import VERSION
from .program import Function, Program, Stage, Weight, Where
from .region import Region, sliced
from .symbols import MAX_EXPONENT, UNBOUNDED, Symbol, SymbolTable, fits, is_short_product, is_tractable
from .tree import LEAF, Tree, is_call
from .types import DTYPES, type_text

MAX_TEXT = 256 * 2**20
MAX_NODES = 10**6
MAX_NAME = 1024
MAX_DEPTH = 64
MAX_RANK = 64
MAX_ITEMS = 2**19  # of lists, trees and schedules, in all
MAX_TERMS = 256  # of one size
MAX_SYMBOLS = 1024

_KEPT_TOKENS = 2**16
_MOST_SHOWN = 200  # characters of what stands there, and twice as many of a message

_TOKEN = re.compile(
    r"""(?P<space>[ \t\r]+)|(?P<newline>\n)|(?P<comment>\#[^\n]*)
    |(?P<value>%(?:[A-Za-z_0-9][A-Za-z0-9_.]*|"(?:[^"\\\n]++|\\.)*+"))
    |(?P<weight>@(?:[A-Za-z_][A-Za-z0-9_.]*|"(?:[^"\\\n]++|\\.)*+"))
    |(?P<string>"(?:[^"\\\n]++|\\.)*+")
    |(?P<float>-?(?:[0-9]+\.[0-9]*(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)|-inf\b)
    |(?P<int>[0-9]+)(?![A-Za-z_])
    |(?P<name>[A-Za-z_][A-Za-z0-9_.]*)
    |(?P<punct>//|[-+*%()\[\]{}:,=])""",
    re.VERBOSE,
)
_PROVENANCE = re.compile(r"#\s?(?:\[([0-9]{1,18}(?:,[0-9]{1,18})*)\](?: |$))?(?:(.*?):([0-9]{1,18})(?: |$))?(.*)$")
_DIGEST = re.compile(r"\?|[0-9a-f]{12,64}")
_KINDS = ("parameter", "added", "buffer", "constant", "state", "record")
_KEYWORDS: dict[str, Any] = {"none": None, "true": True, "false": False, "inf": float("inf"), "nan": float("nan")}
_CHOICES: dict[str, Callable[[Any, Any], Any]] = {"Min": torch.sym_min, "Max": torch.sym_max}
_SYMBOL_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_DATA_DEPENDENT = re.compile(r"\bu\d+\b")  # how torch names a size that only the data tell
_LAYOUTS = {str(x).removeprefix("torch."): x for x in (torch.strided, torch.sparse_coo)}
_FORMATS = {
    str(x).removeprefix("torch."): x for x in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}


class _Token:
    __slots__ = ("kind", "text", "line", "column")

    def __init__(self, kind: str, text: str, line: int, column: int):
        self.kind, self.text, self.line, self.column = kind, text, line, column


def parse(text: str, weights: "Mapping[str, torch.Tensor | Weight] | None" = None) -> Program:
    """The program that `text` describes. Without `weights` it prints, verifies and compares; with them it also runs.

    Raises:
        ParseError: with line and column: bad syntax, an unknown operation, a type that does not hold, or a weight table
            that does not have what the text names.
    """
    if not isinstance(text, str):
        raise ParseError(f"a program is read from text, not from a {type(text).__name__}", 1, 1)
    if weights is not None and not isinstance(weights, Mapping):
        raise ParseError(f"a weight table maps names to tensors, and a {type(weights).__name__} does not", 1, 1)
    if len(text) > MAX_TEXT:
        raise ParseError(f"the text has {len(text)} characters, more than the limit of {MAX_TEXT}", 1, 1)
    return _Parser(text, weights).program()


def is_symbol_name(name: str) -> bool:
    """Whether text can declare a symbol of that name."""
    return bool(_SYMBOL_NAME.fullmatch(name)) and name not in _KEYWORDS and name not in _CHOICES and not _DATA_DEPENDENT.fullmatch(name)


def _tokens_of(text: str) -> Iterator[_Token]:
    """The tokens in order, then the end again and again. Of comments only those that follow something on their line."""
    line, start, position, filled = 1, 0, 0, 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ParseError(f"unexpected character {ascii(text[position])}", line, position - start + 1)
        kind = match.lastgroup or ""
        if kind == "newline":
            line, start = line + 1, match.end()
        elif kind != "space" and not (kind == "comment" and filled != line):
            if kind in ("value", "weight", "name") and len(match.group()) > MAX_NAME:
                raise ParseError(f"a name is longer than {MAX_NAME} characters", line, position - start + 1)
            yield _Token(kind, match.group(), line, position - start + 1)
            filled = line
        position = match.end()
    end = _Token("end", "end of text", line, position - start + 1)
    while True:
        yield end


class _Parser:
    def __init__(self, text: str, weights: "Mapping[str, torch.Tensor | Weight] | None"):
        self.made = _tokens_of(text)
        self.tokens: list[_Token] = []  # those made so far, less what was read long ago
        self.index = 0
        self.last = 0  # index of the token consumed last
        self.table = weights
        self.symbols = SymbolTable()
        self.weights: dict[str, Weight] = {}
        self.nodes = 0
        self.items = 0
        self.terms = 0  # of the size that is read
        self.depth = 0

    # --- tokens ---

    def at(self, index: int) -> _Token:
        """The token of that index; they are made when they are asked for, so that what is refused early costs little."""
        while index >= len(self.tokens):
            self.tokens.append(next(self.made))
        return self.tokens[index]

    @property
    def token(self) -> _Token:
        while (token := self.at(self.index)).kind == "comment":
            self.index += 1
        return token

    def advance(self) -> _Token:
        token = self.token
        self.last = self.index
        if token.kind != "end":
            self.index += 1
        if self.last > _KEPT_TOKENS:
            del self.tokens[: self.last]
            self.index, self.last = self.index - self.last, 0
        return token

    def fail(self, message: str, token: _Token | None = None) -> NoReturn:
        token = token or self.token
        raise ParseError(_in_a_line(message), token.line, token.column)

    def count_item(self) -> None:
        self.items += 1
        if self.items > MAX_ITEMS:
            self.fail(f"lists, trees and schedules have more than {MAX_ITEMS} items")

    def expect(self, text: str) -> _Token:
        if self.token.text != text or self.token.kind == "string":
            self.fail(f"expected '{text}', found {_shown(self.token)}")
        return self.advance()

    def accept(self, text: str) -> bool:
        if self.token.text == text and self.token.kind in ("punct", "name"):
            self.advance()
            return True
        return False

    def take(self, kind: str, what: str) -> _Token:
        if self.token.kind != kind:
            self.fail(f"expected {what}, found {_shown(self.token)}")
        return self.advance()

    def integer(self, below: int = 2**63) -> int:
        negative = self.accept("-")
        token = self.take("int", "an integer")
        value = int(token.text[:21]) * (-1 if negative else 1)
        if len(token.text) > 20 or not -(2**63) <= value < below:
            self.fail("an integer does not fit in 64 bits", token)
        return value

    def string(self) -> str:
        return self._unquote(self.take("string", "a string"))

    def _unquote(self, token: _Token, skip: int = 0) -> str:
        text = token.text[skip:]
        if not text.startswith('"'):
            return text
        try:
            return json.loads(text)
        except ValueError:
            self.fail("a string has a bad escape", token)

    def any_name(self) -> str:
        return self.string() if self.token.kind == "string" else self.take("name", "a name").text

    # --- sections ---

    def program(self) -> Program:
        self.expect("graphwright")
        version = self.token
        if self.integer() != VERSION:
            self.fail(f"this is text of version {version.text}; this graphwright reads version {VERSION}", version)
        functions: dict[str, Function] = {}
        schedules: dict[str, Any] = {}
        history: list[Stage] = []
        while self.token.kind != "end":
            head = self.take("name", "a section (symbol, weight, function, schedule, pipeline)")
            if head.text == "symbol":
                self._symbol()
            elif head.text == "weight":
                self._weight()
            elif head.text == "function":
                token = self.token
                function = self._function()
                if function.name in functions:
                    self.fail(f"function {function.name} is defined twice", token)
                functions[function.name] = function
            elif head.text == "schedule":
                token = self.token
                name = self.any_name()
                if name in schedules:
                    self.fail(f"schedule {name} is given twice", token)
                self.expect("=")
                schedules[name] = self._json()
            elif head.text == "pipeline":
                history.append(Stage(self.string()))
            else:
                self.fail(f"expected a section (symbol, weight, function, schedule, pipeline), found {_shown(head)}", head)
        if "main" not in functions:
            self.fail("the text defines no function main")
        return Program(functions.values(), self.weights, self.symbols, schedules, tuple(history))

    def _symbol(self) -> None:
        token = self.take("name", "a symbol")
        if len(self.symbols) >= MAX_SYMBOLS:
            self.fail(f"the program has more than {MAX_SYMBOLS} symbols", token)
        if not is_symbol_name(token.text) or token.text in self.symbols:
            self.fail(
                f"{token.text} cannot be declared: symbols are {_SYMBOL_NAME.pattern}, each once, no keyword, and not u0, u1, ..", token
            )
        self.expect("in")
        self.expect("[")
        low = self.integer()
        self.expect(",")
        high = UNBOUNDED if self.accept("inf") else self.integer()
        self.expect("]")
        self.expect("hint")
        hint = self.integer()
        if not 0 <= low <= hint <= high:
            self.fail(f"symbol {token.text} needs 0 <= low <= hint <= high, found {low}, {hint}, {high}", token)
        self.symbols.declare(Symbol(token.text, low, high, hint))

    def _weight(self) -> None:
        token = self.take("weight", "a weight")
        name = self._unquote(token, 1)
        if name in self.weights:
            self.fail(f"weight {name} is declared twice", token)
        self.expect(":")
        dtype, shape, stride, device = self._tensor_type()
        if any(not isinstance(size, int) for size in (*shape, *stride)):
            self.fail(f"weight {name} has a symbolic size", token)
        kind = self.take("name", "the weight's kind")
        if kind.text not in _KINDS:
            self.fail(f"a weight is one of {', '.join(_KINDS)}, not {kind.text}", kind)
        hash_ = self.token
        digest = self.string()
        if not _DIGEST.fullmatch(digest):
            self.fail('the hash of a weight is at least 12 hexadecimal digits, or "?" where it is not known', hash_)
        weight = Weight(name, kind.text, dtype, tuple(shape), tuple(stride), device, known_digest=digest)
        self.weights[name] = self._filled(weight, token) if self.table is not None else weight

    def _filled(self, weight: Weight, token: _Token) -> Weight:
        assert self.table is not None
        given = self.table.get(weight.name)
        tensor = given.tensor if isinstance(given, Weight) else given
        if tensor is None:
            self.fail(f"the weight table has no {weight.name}", token)
        if not isinstance(tensor, torch.Tensor):
            self.fail(f"{weight.name} is a {type(tensor).__name__} in the weight table, not a tensor", token)
        if (tensor.dtype, tuple(tensor.shape)) != (weight.dtype, weight.shape):
            self.fail(f"{weight.name} is {tensor.dtype}{list(tensor.shape)} in the weight table, not what the text says", token)
        if tensor.stride() != weight.stride:
            try:
                tensor = torch.empty_strided(weight.shape, weight.stride, dtype=weight.dtype, device=tensor.device).copy_(tensor)
            except RuntimeError as error:
                self.fail(f"{weight.name} cannot be laid out in strides {list(weight.stride)}: {first_line(error)}", token)
        filled = replace(weight, tensor=tensor, known_digest=None, _memo={})
        if weight.known_digest != "?" and not filled.digest.startswith(weight.known_digest or ""):
            self.fail(f"{weight.name} has other contents in the weight table than in the text", token)
        return filled

    def _function(self) -> Function:
        name = self.take("name", "the function's name").text
        self.expect("{")
        self.expect("takes")
        token = self.token
        in_tree = self._tree()
        if not is_call(in_tree):
            self.fail(f"function {name} takes a tuple of arguments and a dict of named ones: ((..), {{..}})", token)
        self.expect("gives")
        out_tree = self._tree()
        body = _Body(self)
        token = self.token
        graph = body.read()
        function = Function(name, graph, in_tree, out_tree)
        signature = function.signature()
        if in_tree.num_leaves != len(signature.inputs) or out_tree.num_leaves != len(signature.outputs):
            self.fail(
                f"function {name} takes {in_tree.num_leaves} and gives {out_tree.num_leaves} leaves, "
                f"but has {len(signature.inputs)} inputs and returns {len(signature.outputs)}",
                token,
            )
        return function

    # --- types and trees ---

    def _tensor_type(self) -> tuple[torch.dtype, list[Any], list[Any], torch.device]:
        token = self.take("name", "a dtype")
        if token.text not in DTYPES:
            self.fail(f"unknown dtype {token.text}: it is one of {', '.join(DTYPES)}", token)
        shape = self._sizes()
        if not is_short_product(shape):
            self.fail("the sizes of a tensor have too many terms", token)
        stride = self._sizes() if self.accept("strides") else list(contiguous_stride(shape))
        if len(shape) > MAX_RANK or len(stride) != len(shape):
            self.fail(f"a tensor has {len(shape)} sizes and {len(stride)} strides", token)
        too_far = any(isinstance(step, int) and step >= 2**63 for step in stride)  # of a dim of one element, which addresses nothing
        if too_far or _last_address(shape, stride) * DTYPES[token.text].itemsize >= 2**63:
            self.fail("a tensor of these sizes and strides has more than 2**63 - 1 bytes", token)
        device = torch.device("cpu")
        if self.accept("on"):
            parts = [self.any_name()]
            if self.accept(":"):
                parts.append(str(self.integer()))
            device = self._device(":".join(parts), token)
        return DTYPES[token.text], shape, stride, device

    def _device(self, text: str, token: _Token) -> torch.device:
        try:
            return torch.device(text)
        except RuntimeError:
            self.fail(f"unknown device {text}", token)

    def _sizes(self) -> list[Any]:
        self.expect("[")
        sizes: list[Any] = []
        while not self.accept("]"):
            if sizes:
                self.expect(",")
            token = self.token
            self.terms = 0
            size = self.expression()
            if isinstance(size, int) and not 0 <= size < 2**63:
                self.fail(f"{size} is no size", token)
            sizes.append(size)
        return sizes

    def expression(self) -> Any:
        """A size: sums of products of atoms."""
        self._enter()
        value = self._product()
        while self.token.text in ("+", "-") and self.token.kind == "punct":
            sign = self.advance()
            other = self._product()
            value = self._computed(value + other if sign.text == "+" else value - other, sign)
        self._leave()
        return value

    def _product(self) -> Any:
        value = self._atom()
        while self.token.text in ("*", "//", "%") and self.token.kind == "punct":
            operation = self.advance()
            other = self._atom()
            if not is_short_product((value, other)):
                self.fail("a product of sizes has too many terms", operation)
            try:
                value = value * other if operation.text == "*" else value // other if operation.text == "//" else value % other
            except ZeroDivisionError:
                self.fail("division by zero", operation)
            value = self._computed(value, operation)
        return value

    def _computed(self, value: Any, operation: _Token) -> Any:
        """`value`, which one more operation of this size gave."""
        self.terms += 1
        if self.terms > MAX_TERMS:
            self.fail(f"a size has more than {MAX_TERMS} terms", operation)
        if not fits(value):
            self.fail("a size does not fit in 64 bits", operation)
        if not is_tractable(value):
            self.fail("a size has too many products inside quotients", operation)
        return value

    def _atom(self) -> Any:
        token = self.token
        if self.accept("("):
            value = self.expression()
            self.expect(")")
            return value
        if token.kind == "name":
            self.advance()
            if token.text in _CHOICES and self.accept("("):
                return self._choice(_CHOICES[token.text])
            if token.text not in self.symbols:
                self.fail(f"unknown symbol {token.text}", token)
            return self.symbols.size(token.text)
        return self.integer()

    def _choice(self, choose: Callable[[Any, Any], Any]) -> Any:
        """The rest of Min(a, b, ..) or Max(a, b, ..)."""
        value = self.expression()
        while self.accept(","):
            value = choose(value, self.expression())
        self.expect(")")
        return value

    def _type(self) -> Any:
        """The fake value of an input's type."""
        if self.accept("size"):
            self.expect("(")
            self.terms = 0
            value = self.expression()
            self.expect(")")
            return value
        token = self.token
        dtype, shape, stride, device = self._tensor_type()
        try:
            return fake_like(self.symbols, dtype, shape, stride, device)
        except (RuntimeError, AssertionError, TypeError) as error:  # a size that is computed of symbols may be none
            self.fail(f"no such tensor: {first_line(error)}", token)

    def _tree(self) -> Tree:
        self._enter()
        tree = self._tree_inside()
        self._leave()
        return tree

    def _tree_inside(self) -> Tree:
        if self.accept("*"):
            return LEAF
        if self.accept("["):
            return Tree("list", self._children("]"))
        if self.accept("("):
            return Tree("tuple", self._children(")"))
        if self.accept("object"):
            type_name, context = self.string(), self.string()
            self.expect("(")
            return Tree("object", self._children(")"), type_name=type_name, context=context)
        self.expect("{")
        children: dict[str | int, Tree] = {}
        while not self.accept("}"):
            if children:
                self.expect(",")
            self.count_item()
            token = self.token
            key = self.string() if token.kind == "string" else self.integer()
            if key in children:
                self.fail(f"the key {token.text} is given twice", token)
            self.expect(":")
            children[key] = self._tree()
        return Tree("dict", tuple(children.values()), keys=tuple(children))

    def _children(self, close: str) -> tuple[Tree, ...]:
        children: list[Tree] = []
        while not self.accept(close):
            if children:
                self.expect(",")
            self.count_item()
            children.append(self._tree())
        return tuple(children)

    def _json(self) -> Any:
        self._enter()
        if self.accept("["):
            value: Any = []
            while not self.accept("]"):
                if value:
                    self.expect(",")
                self.count_item()
                value.append(self._json())
        elif self.accept("{"):
            value = {}
            while not self.accept("}"):
                if value:
                    self.expect(",")
                self.count_item()
                token = self.token
                key = self.string()
                if key in value:
                    self.fail(f"the key {token.text} is given twice", token)
                self.expect(":")
                value[key] = self._json()
        elif self.token.kind in ("string", "float"):
            value = self.string() if self.token.kind == "string" else float(self.advance().text)
        elif self.token.text in ("null", "true", "false"):
            value = {"null": None, "true": True, "false": False}[self.advance().text]
        else:
            value = self.integer()
        self._leave()
        return value

    def _enter(self) -> None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nesting is deeper than {MAX_DEPTH}")

    def _leave(self) -> None:
        self.depth -= 1


class _Body:
    """Reads the inputs, calls and return of a function or region into a graph."""

    def __init__(self, parser: _Parser, outer: "_Body | None" = None):
        self.parser = parser
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.weight_nodes: dict[str, fx.Node] = {}
        self.is_region = outer is not None
        # Regions number their values on from the function around them, so one set sees a name that is used twice.
        self.taken: set[str] = outer.taken if outer else set()

    def read(self) -> fx.Graph:
        parser = self.parser
        while parser.token.text in ("input", "state") and parser.token.kind == "name":
            self._input()
        while parser.token.kind == "value":
            self._call()
        self._return()
        parser.expect("}")
        return self.graph

    def _define(self, token: _Token, node: fx.Node) -> None:
        if token.text in self.taken:
            self.parser.fail(f"{token.text} is defined twice", token)
        self.taken.add(token.text)
        self.values[token.text] = node

    def _input(self) -> None:
        parser = self.parser
        role = parser.advance().text
        token = parser.take("value", "a value name")
        name = parser._unquote(token, 1)
        value = self.literal() if parser.accept("=") else (parser.expect(":"), parser._type())[1]
        if self.is_region:
            name = "v" + name
        self._define(token, add_placeholder(self.graph, name, value, role))

    def _call(self) -> None:
        parser = self.parser
        parser.nodes += 1
        if parser.nodes > MAX_NODES:
            parser.fail(f"the program has more than {MAX_NODES} operations")
        result = parser.advance()
        parser.expect("=")
        name = parser.take("name", "an operation")
        try:
            target = target_of(name.text)
        except KeyError:
            parser.fail(f"unknown operation {name.text}", name)
        if is_mutating(target):
            parser.fail(f"{name.text} writes to an operand: programs are functional", name)
        args, kwargs = self._arguments()
        region_at = None
        if target is sliced:
            args, kwargs = self._region_attributes(args)
        stated = self._stated_type() if parser.accept(":") else None
        if target is sliced:
            parser.expect("{")
            origin, where = self._provenance()
            region_at = parser.token
            parser._enter()
            args = (Region(_Body(parser, self).read()), *args)
            parser._leave()
        else:
            origin, where = self._provenance()
        if name.text == "sym.pow" and not (len(args) == 2 and isinstance(args[1], int) and abs(args[1]) <= MAX_EXPONENT):
            parser.fail(f"the exponent of sym.pow is an integer of at most {MAX_EXPONENT}", name)
        try:
            node = add_call(self.graph, parser.symbols, target, args, kwargs, origin=origin, where=where)
        except InferenceError as error:
            parser.fail(f"{name.text} does not type-check: {parser.symbols.named(str(error))}", region_at or name)
        given = type_text(node.meta["val"], parser.symbols)
        if stated is not None and _nameless(stated) != _nameless(given):
            written = re.sub(r" ?([\[\]()]) ?", r"\1", stated).replace(" ,", ",")
            parser.fail(f"{name.text} gives {given}, not {written}", name)
        self._define(result, node)

    def _region_attributes(self, operands: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        attributes: dict[str, Any] = {}
        while self.parser.token.kind == "name":
            name = self.parser.advance()
            if name.text not in ("in_dims", "out_dims", "count", "units", "orders") or name.text in attributes:
                self.parser.fail(f"gw.sliced has no attribute {name.text} here", name)
            self.parser.expect("=")
            attributes[name.text] = self.literal()
        for required in ("in_dims", "out_dims", "count"):
            if required not in attributes:
                self.parser.fail(f"gw.sliced needs {required}")
        args = (attributes["in_dims"], attributes["out_dims"], attributes["count"], *operands)
        return args, {name: attributes[name] for name in ("units", "orders") if attributes.get(name) is not None}

    def _stated_type(self) -> str:
        """The tokens of a type."""
        parser, pieces = self.parser, []
        line = parser.token.line
        while parser.token.kind != "end" and parser.token.line == line:
            if parser.token.text == "{":
                break
            pieces.append(parser.advance().text)
        return " ".join(pieces)

    def _provenance(self) -> tuple[tuple[int, ...], Where]:
        last = self.parser.tokens[self.parser.last]
        token = self.parser.at(self.parser.last + 1)
        match = _PROVENANCE.match(token.text) if token.kind == "comment" and token.line == last.line else None
        if match is None:
            return (), Where()
        origin, file, line, module = match.groups()
        return tuple(map(int, origin.split(","))) if origin else (), Where(file or "", int(line or 0), module or "")

    def _arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        parser = self.parser
        parser.expect("(")
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        while not parser.accept(")"):
            if args or kwargs:
                parser.expect(",")
            if parser.token.kind == "name" and parser.at(parser.index + 1).text == "=":
                key = parser.advance()
                parser.expect("=")
                if key.text in kwargs:
                    parser.fail(f"{key.text} is given twice", key)
                kwargs[key.text] = self.literal()
            elif kwargs:
                parser.fail("a positional argument follows a named one")
            else:
                args.append(self.literal())
        return tuple(args), kwargs

    def _return(self) -> None:
        parser = self.parser
        parser.expect("return")
        leaves: list[Any] = []
        names: dict[str, Any] = {}
        while parser.token.text not in ("}", "state"):
            if leaves:
                parser.expect(",")
            leaves.append(self.literal())
        if parser.accept("state"):
            while parser.token.text != "}":
                if names:
                    parser.expect(",")
                token = parser.token
                name = parser.any_name()
                if name in names:
                    parser.fail(f"{name} gets two new values", token)
                parser.expect("=")
                names[name] = self.literal()
        set_outputs(self.graph, [*leaves, *names.values()], tuple(names))

    def literal(self) -> Any:
        parser = self.parser
        token = parser.advance()
        if token.kind == "value":
            if token.text not in self.values:
                parser.fail(f"{token.text} is not defined here", token)
            return self.values[token.text]
        if token.kind == "weight":
            return self._weight_node(token)
        if token.kind == "string":
            return parser._unquote(token)
        if token.kind == "float":
            return float(token.text)
        if token.kind == "int" or token.text == "-":
            parser.index -= 1
            return parser.integer(below=2**64)  # an unsigned one
        if token.text == "[" and token.kind == "punct":
            return self._list()
        if token.kind == "name":
            return self._named_literal(token)
        parser.fail(f"expected an argument, found {_shown(token)}", token)

    def _number(self) -> float:
        parser = self.parser
        if parser.token.kind == "float":
            return float(parser.advance().text)
        if parser.token.text in ("inf", "nan"):
            return float(parser.advance().text)
        return float(parser.integer())

    def _list(self) -> list[Any]:
        self.parser._enter()
        items: list[Any] = []
        while not self.parser.accept("]"):
            if items:
                self.parser.expect(",")
            self.parser.count_item()
            items.append(self.literal())
        self.parser._leave()
        return items

    def _weight_node(self, token: _Token) -> fx.Node:
        parser = self.parser
        name = parser._unquote(token, 1)
        if name not in parser.weights:
            parser.fail(f"weight {token.text} is not declared", token)
        if self.is_region:
            parser.fail("a region takes its weights as operands", token)
        if name not in self.weight_nodes:
            self.weight_nodes[name] = add_weight(self.graph, parser.weights[name], parser.symbols)
        return self.weight_nodes[name]

    def _named_literal(self, token: _Token) -> Any:
        parser = self.parser
        if token.text in _KEYWORDS:
            return _KEYWORDS[token.text]
        if token.text in DTYPES:
            return DTYPES[token.text]
        if token.text not in ("device", "layout", "memory_format", "complex"):
            parser.fail(f"expected an argument, found {token.text}", token)
        parser.expect("(")
        if token.text == "complex":
            real = self._number()
            parser.expect(",")
            value: Any = complex(real, self._number())
        else:
            text = parser.string()
            tables: dict[str, dict[str, Any]] = {"layout": _LAYOUTS, "memory_format": _FORMATS}
            known = tables.get(token.text)
            value = parser._device(text, token) if known is None else known.get(text)
            if value is None:
                parser.fail(f"unknown {token.text} {text}", token)
        parser.expect(")")
        return value


def _nameless(type_: str) -> str:
    # Data-dependent sizes are numbered by torch's own counter, which two runs do not share.
    return re.sub(r"\s", "", _DATA_DEPENDENT.sub("u", type_))


def _last_address(shape: list[Any], stride: list[Any]) -> int:
    """The largest step or, in elements, address of a tensor; 0 where symbols tell it."""
    if not all(isinstance(size, int) for size in (*shape, *stride)):
        return 0
    return max([sum(size * step for size, step in zip(shape, stride, strict=True)), *stride, 0])


def _shown(token: _Token) -> str:
    return token.text if token.kind == "end" else f"'{token.text[:_MOST_SHOWN]}'"


def _in_a_line(message: str) -> str:
    """A message that nothing in the text can end, colour, turn around or lengthen."""
    plain = printable(message[: 2 * _MOST_SHOWN]).replace("\n", "\\n")
    return plain if len(plain) <= 2 * _MOST_SHOWN else f"{plain[: 2 * _MOST_SHOWN]} .."
