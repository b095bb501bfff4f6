"""The closed expression language of lifted masks and captured activations.

A mask such as "causal within the same document" and an activation such as "x * sigmoid(1.702 * x)" travel through the
compiler as text in one small language. The text is parsed here by a hand-written parser (never evaluated as Python),
can be evaluated on torch tensors, differentiated symbolically, and printed as Triton or C++.

Grammar, weakest binding first (comparisons do not chain):

    expression := and_ ("|" and_)*                         booleans
    and_       := comparison ("&" comparison)*
    comparison := sum (("<" | "<=" | ">" | ">=" | "==" | "!=") sum)?
    sum        := product (("+" | "-") product)*
    product    := unary (("*" | "/") unary)*               "/" is true division
    unary      := ("-" | "~") unary | primary
    primary    := number | "inf" | "nan" | "true" | "false" | name | name "[" expression ("," expression)* "]"
                | function "(" expression ("," expression)* ")" | "(" expression ")"
    name       := lower-case letters followed by digits, at most 12 characters, not a function

A mask expression uses the integer variables b, h, q, k and reads such as t0[b, k]; an activation expression uses x0, x1
(pre-activations) and a0, a1, ... (captured scalars or vectors). Names ending a read are those of tensors.

Every value is a boolean, an integer or a float ("kind"). Booleans count as 0 and 1 in arithmetic; `pow`, "/" and the
transcendental functions give floats; `floordiv` and `mod` round towards minus infinity, as torch and Python do.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from spt_compiler.errors import ExpressionError

__all__ = [
    "CPP_PRELUDE",
    "Expression",
    "call",
    "conjuncts",
    "const",
    "cpp_source",
    "derivative",
    "evaluate",
    "kind_of",
    "mask_tensor",
    "parse",
    "read",
    "read_ranks",
    "substitute",
    "triton_source",
    "var",
    "vjp",
]

MAX_TEXT = 8192
MAX_DEPTH = 128
MAX_SIZE = 50_000  # nodes of the expanded tree; bounds what a printer can emit

Number = int | float | bool
Emitter = str | Callable[..., str]

_COMPARISONS = ("<", "<=", ">", ">=", "==", "!=")
_ARITHMETIC = ("+", "-", "*", "/")
_BINARY = ("|", "&", *_COMPARISONS, *_ARITHMETIC)
_PRECEDENCE = {"|": 1, "&": 2, **dict.fromkeys(_COMPARISONS, 3), "+": 4, "-": 4, "*": 5, "/": 5, "neg": 6, "not": 6}
_PRIMARY = 7
_NAME = re.compile(r"[a-z]+[0-9]*\Z")
_MAX_NAME = 12
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![A-Za-z0-9_.])"
    r"|(?P<name>[a-z][a-z0-9_]*)(?![A-Z.])|(?P<symbol><=|>=|==|!=|[-+*/<>&|~()\[\],]))"
)
_LITERALS: dict[str, Number] = {"inf": math.inf, "nan": math.nan, "true": True, "false": False}


# ---------------------------------------------------------------------------------------------------------------------
# Functions
# ---------------------------------------------------------------------------------------------------------------------


def _guarded(function: Callable[..., float], at_zero: float = math.nan) -> Callable[..., float]:
    """A `math` function that returns what torch returns (inf, nan) where `math` raises."""

    def scalar(*args: Number) -> float:
        try:
            return float(function(*args))
        except OverflowError:
            return math.inf
        except (ValueError, ZeroDivisionError):
            return at_zero if args[0] == 0 else math.nan

    return scalar


def _log1p(x: float) -> float:
    return -math.inf if x == -1 else _guarded(math.log1p)(x)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def _gelu(x: float) -> float:
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: float) -> float:
    return 0.5 * x * (1.0 + math.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _sign(x: Number) -> Number:
    return (x > 0) - (x < 0)


def _floor(x: Number) -> Number:
    return x if isinstance(x, int) or not math.isfinite(x) else float(math.floor(x))


def _floordiv(a: Number, b: Number) -> Number:
    try:
        return a // b
    except ZeroDivisionError:
        if isinstance(a, int) and isinstance(b, int):
            raise ExpressionError("floordiv of an integer by zero") from None
        return math.copysign(math.inf, a) if a else math.nan


def _mod(a: Number, b: Number) -> Number:
    try:
        return a % b
    except ZeroDivisionError:
        if isinstance(a, int) and isinstance(b, int):
            raise ExpressionError("mod of an integer by zero") from None
        return math.nan


def _first_nan(choose: Callable[[Number, Number], Number]) -> Callable[[Number, Number], Number]:
    """min or max that propagates nan, as torch.minimum and torch.maximum do."""

    def scalar(a: Number, b: Number) -> Number:
        if a != a or b != b:
            return math.nan
        chosen = choose(a, b)
        return float(chosen) if isinstance(a, float) or isinstance(b, float) else chosen

    return scalar


def _pow(x: Number, y: Number) -> float:
    if x == 0 and y < 0:
        return math.inf
    result = float(x) ** float(y)
    return math.nan if isinstance(result, complex) else result


@dataclass(frozen=True)
class _Function:
    """One function of the language.

    Args:
        arity: number of arguments.
        tensor: what torch runs, given tensors (floats for a "float" kind).
        scalar: the same on Python numbers.
        kind: "float" (arguments become floats), "same" (the common kind of the arguments) or "where".
        triton: name of a helper or `tl` function; arguments follow in parentheses.
        cpp: the same for C++.
    """

    arity: int
    tensor: Callable[..., torch.Tensor]
    scalar: Callable[..., Number]
    kind: str
    triton: str
    cpp: str


def _unary(tensor: Callable, scalar: Callable, triton: str, cpp: str, kind: str = "float") -> _Function:
    return _Function(1, tensor, scalar, kind, triton, cpp)


_FUNCTIONS: dict[str, _Function] = {
    "exp": _unary(torch.exp, _guarded(math.exp), "tl.exp", "std::exp"),
    "log": _unary(torch.log, _guarded(math.log, -math.inf), "tl.log", "std::log"),
    "log1p": _unary(torch.log1p, _log1p, "spt_log1p", "std::log1p"),
    "expm1": _unary(torch.expm1, _guarded(math.expm1), "spt_expm1", "std::expm1"),
    "sqrt": _unary(torch.sqrt, _guarded(math.sqrt), "spt_sqrt", "std::sqrt"),
    "rsqrt": _unary(torch.rsqrt, _guarded(lambda x: 1 / math.sqrt(x), math.inf), "tl.rsqrt", "spt_rsqrt"),
    "abs": _unary(torch.abs, abs, "tl.abs", "spt_abs", "same"),
    "sign": _unary(torch.sign, _sign, "spt_sign", "spt_sign", "same"),
    "floor": _unary(torch.floor, _floor, "spt_floor", "spt_floor", "same"),
    "erf": _unary(torch.erf, math.erf, "spt_erf", "std::erf"),
    "tanh": _unary(torch.tanh, math.tanh, "spt_tanh", "std::tanh"),
    "sigmoid": _unary(torch.sigmoid, _guarded(_sigmoid), "spt_sigmoid", "spt_sigmoid"),
    "softplus": _unary(F.softplus, lambda x: x if x > 20 else math.log1p(math.exp(x)), "spt_softplus", "spt_softplus"),
    "relu": _unary(torch.relu, lambda x: x if x > 0 or x != x else type(x)(0), "spt_relu", "spt_relu", "same"),
    "silu": _unary(F.silu, lambda x: x * _guarded(_sigmoid)(x), "spt_silu", "spt_silu"),
    "gelu": _unary(F.gelu, _gelu, "spt_gelu", "spt_gelu"),
    "gelu_tanh": _unary(lambda x: F.gelu(x, approximate="tanh"), _gelu_tanh, "spt_gelu_tanh", "spt_gelu_tanh"),
    "min": _Function(2, torch.minimum, _first_nan(min), "same", "spt_min", "spt_min"),
    "max": _Function(2, torch.maximum, _first_nan(max), "same", "spt_max", "spt_max"),
    "pow": _Function(2, torch.pow, _guarded(_pow), "float", "spt_pow", "std::pow"),
    "where": _Function(3, torch.where, lambda c, a, b: a if c else b, "where", "tl.where", ""),
    "floordiv": _Function(2, torch.floor_divide, _floordiv, "same", "spt_floordiv", "spt_floordiv"),
    "mod": _Function(2, torch.remainder, _mod, "same", "spt_mod", "spt_mod"),
    "sin": _unary(torch.sin, _guarded(math.sin), "tl.sin", "std::sin"),
    "cos": _unary(torch.cos, _guarded(math.cos), "tl.cos", "std::cos"),
    "square": _unary(torch.square, lambda x: x * x, "spt_square", "spt_square", "same"),
}


# ---------------------------------------------------------------------------------------------------------------------
# The tree
# ---------------------------------------------------------------------------------------------------------------------


class Expression:
    """One node: immutable, hashable, compared by structure.

    `op` is "const", "var", "read", "neg", "not", a binary operator or a function name; `args` are its operands (the
    indices of a read); `value` is the number of a constant or the name of a variable or read. Build it with `parse`,
    `const`, `var`, `read`, `call` or Python's operators; `==` compares trees, equality of values is `call("==", a, b)`.

    Raises: ExpressionError where the tree would be too deep or too large.
    """

    __slots__ = ("_hash", "_variables", "args", "depth", "op", "size", "value")
    op: str
    args: tuple[Expression, ...]
    value: Any
    depth: int
    size: int
    _hash: int
    _variables: frozenset[str] | None

    def __init__(self, op: str, args: tuple[Expression, ...] = (), value: Number | str | None = None):
        depth = 1 + max((a.depth for a in args), default=0)
        size = 1 + sum(a.size for a in args)
        if depth > MAX_DEPTH or size > MAX_SIZE:
            raise ExpressionError(f"expression too large: depth {depth} of {MAX_DEPTH}, {size} nodes of {MAX_SIZE}")
        # 1, 1.0 and True are equal in Python and three different constants here; so are 0.0 and -0.0.
        key = (type(value).__name__, repr(value))
        for name, item in (
            ("op", op),
            ("args", args),
            ("value", value),
            ("depth", depth),
            ("size", size),
            ("_hash", hash((op, key, args))),
            ("_variables", None),
        ):
            object.__setattr__(self, name, item)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("an Expression is immutable")

    __delattr__ = __setattr__  # type: ignore[assignment]

    def __reduce__(self) -> tuple:
        return (Expression, (self.op, self.args, self.value))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Expression) or self._hash != other._hash or self.op != other.op:
            return False
        same_value = type(self.value) is type(other.value) and repr(self.value) == repr(other.value)
        return same_value and self.args == other.args

    def __str__(self) -> str:
        return _text(self)

    def __repr__(self) -> str:
        return f"Expression({str(self)!r})"

    @property
    def variables(self) -> frozenset[str]:
        """Names of the variables and of the tensors that are read."""
        known = self._variables
        if known is None:
            own = {self.value} if self.op in ("var", "read") else set()
            known = frozenset(own.union(*(a.variables for a in self.args)))
            object.__setattr__(self, "_variables", known)
        return known

    def __add__(self, other: Expression | Number) -> Expression:
        return call("+", self, other)

    def __radd__(self, other: Number) -> Expression:
        return call("+", other, self)

    def __sub__(self, other: Expression | Number) -> Expression:
        return call("-", self, other)

    def __rsub__(self, other: Number) -> Expression:
        return call("-", other, self)

    def __mul__(self, other: Expression | Number) -> Expression:
        return call("*", self, other)

    def __rmul__(self, other: Number) -> Expression:
        return call("*", other, self)

    def __truediv__(self, other: Expression | Number) -> Expression:
        return call("/", self, other)

    def __rtruediv__(self, other: Number) -> Expression:
        return call("/", other, self)

    def __lt__(self, other: Expression | Number) -> Expression:
        return call("<", self, other)

    def __le__(self, other: Expression | Number) -> Expression:
        return call("<=", self, other)

    def __gt__(self, other: Expression | Number) -> Expression:
        return call(">", self, other)

    def __ge__(self, other: Expression | Number) -> Expression:
        return call(">=", self, other)

    def __and__(self, other: Expression | bool) -> Expression:
        return call("&", self, other)

    def __rand__(self, other: bool) -> Expression:
        return call("&", other, self)

    def __or__(self, other: Expression | bool) -> Expression:
        return call("|", self, other)

    def __ror__(self, other: bool) -> Expression:
        return call("|", other, self)

    def __neg__(self) -> Expression:
        return call("neg", self)

    def __invert__(self) -> Expression:
        return call("not", self)

    def __bool__(self) -> bool:
        raise TypeError("an Expression has no truth value; use &, | and ~")


def const(value: Number) -> Expression:
    """A constant. Raises: ExpressionError unless `value` is a bool, a 64-bit int or a float."""
    if isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**63:
        raise ExpressionError(f"integer constant {value} does not fit 64 bits")
    if not isinstance(value, (bool, int, float)):
        raise ExpressionError(f"a constant must be a bool, int or float, not {type(value).__name__}")
    # Subclasses (numpy.float64, IntEnum) print in their own way; the tree holds plain numbers only.
    for plain in (bool, int, float):
        if isinstance(value, plain):
            return Expression("const", (), plain(value))
    raise AssertionError("unreachable")


def _check_name(name: str) -> str:
    if not isinstance(name, str) or len(name) > _MAX_NAME or not _NAME.match(name):
        raise ExpressionError(f"{name!r:.40} is not a name: lower-case letters then digits, at most {_MAX_NAME}")
    if name in _FUNCTIONS or name in _LITERALS:
        raise ExpressionError(f"{name!r} is a word of the language and cannot name a variable")
    return name


def var(name: str) -> Expression:
    """The variable `name`. Raises: ExpressionError if it is not a name of the grammar."""
    return Expression("var", (), _check_name(name))


def read(name: str, *index: Expression | Number) -> Expression:
    """The element `name[index...]` of a tensor. Raises: ExpressionError without an index or for a bad name."""
    if not index:
        raise ExpressionError(f"a read of {name!r:.40} needs at least one index")
    return Expression("read", tuple(_as_expression(i) for i in index), _check_name(name))


def _as_expression(value: Expression | Number) -> Expression:
    return value if isinstance(value, Expression) else const(value)


def call(function: str, *args: Expression | Number) -> Expression:
    """Apply a function or an operator ("+", "<=", "&", "neg" or "-" with one argument, "not" or "~").

    Raises: ExpressionError for an unknown function or a wrong number of arguments.
    """
    operands = tuple(_as_expression(a) for a in args)
    function = {"~": "not", "-": "neg" if len(operands) == 1 else "-"}.get(function, function)
    if function in ("neg", "not"):
        arity = 1
    elif function in _BINARY:
        arity = 2
    elif function in _FUNCTIONS:
        arity = _FUNCTIONS[function].arity
    else:
        raise ExpressionError(f"unknown function {function!r:.40}")
    if len(operands) != arity:
        raise ExpressionError(f"{function} takes {arity} argument{'s' * (arity > 1)}, got {len(operands)}")
    # A negative number is a constant, not a negation: one spelling, so that text and tree round-trip.
    if function == "neg" and operands[0].op == "const":
        return const(-operands[0].value)
    return Expression(function, operands)


def substitute(expr: Expression, replacements: Mapping[str, Expression | str]) -> Expression:
    """`expr` with variables replaced by expressions; a str renames a variable or the tensor of a read."""

    def build(node: Expression) -> Expression:
        args = tuple(build(a) for a in node.args)
        if node.op not in ("var", "read"):
            return call(node.op, *args) if args else node
        new = replacements.get(node.value, node.value)
        if isinstance(new, Expression):
            if node.op == "read":
                raise ExpressionError(f"{node.value} is a tensor and can only be renamed")
            return new
        return read(new, *args) if node.op == "read" else var(new)

    return build(expr)


def conjuncts(expr: Expression) -> tuple[Expression, ...]:
    """The operands of the outermost "&" chain; (expr,) when it is no conjunction."""
    if expr.op != "&":
        return (expr,)
    return conjuncts(expr.args[0]) + conjuncts(expr.args[1])


def read_ranks(expr: Expression) -> dict[str, int]:
    """Rank of every tensor that is read. Raises: ExpressionError if one is read with two different ranks."""
    ranks: dict[str, int] = {}

    def walk(node: Expression) -> None:
        if node.op == "read" and ranks.setdefault(node.value, len(node.args)) != len(node.args):
            raise ExpressionError(f"{node.value} is read with {ranks[node.value]} and with {len(node.args)} indices")
        for arg in node.args:
            walk(arg)

    walk(expr)
    return ranks


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


class _Parser:
    """Precedence climbing over a token list; positions are kept for messages."""

    def __init__(self, text: str):
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        self.at = 0
        self.nesting = 0
        position = 0
        end = len(text.rstrip())
        while position < end:
            match = _TOKEN.match(text, position)
            if match is None:
                raise self.error("unexpected text", position + len(text[position:]) - len(text[position:].lstrip()))
            kind = str(match.lastgroup)
            self.tokens.append((kind, match.group(kind), match.start(kind)))
            position = match.end()
        self.tokens.append(("end", "", end))

    def error(self, message: str, position: int) -> ExpressionError:
        snippet = self.text[position : position + 20]
        return ExpressionError(f"{message} at column {position + 1}: {snippet!r} (see spt_compiler.expression)")

    def expect(self, symbol: str) -> None:
        kind, token, position = self.tokens[self.at]
        if kind != "symbol" or token != symbol:
            raise self.error(f"expected {symbol!r}", position)
        self.at += 1

    def peek(self, *symbols: str) -> bool:
        kind, token, _ = self.tokens[self.at]
        return kind == "symbol" and token in symbols

    def parse(self) -> Expression:
        result = self.binary(1)
        if self.tokens[self.at][0] != "end":
            raise self.error("unexpected text", self.tokens[self.at][2])
        return result

    def binary(self, minimum: int) -> Expression:
        left = self.unary()
        compared = False
        while True:
            kind, token, position = self.tokens[self.at]
            level = _PRECEDENCE.get(token, 0) if kind == "symbol" and token in _BINARY else 0
            if level < minimum or level == 0:
                return left
            if level == 3 and compared:
                raise self.error("comparisons do not chain; join them with &", position)
            compared = level == 3
            self.at += 1
            left = call(token, left, self.binary(level + 1))

    def unary(self) -> Expression:
        if self.peek("-", "~"):
            _, token, position = self.tokens[self.at]
            self.at += 1
            return call("neg" if token == "-" else "not", self.nested(self.unary, position))
        return self.primary()

    def nested(self, rule: Callable[..., Any], position: int, *args: Any) -> Any:
        # Checked while descending, so that hostile nesting cannot exhaust Python's stack.
        self.nesting += 1
        if self.nesting > MAX_DEPTH:
            raise self.error(f"nesting deeper than {MAX_DEPTH}", position)
        result = rule(*args)
        self.nesting -= 1
        return result

    def arguments(self, closing: str) -> list[Expression]:
        items = [self.binary(1)]
        while self.peek(","):
            self.at += 1
            items.append(self.binary(1))
        self.expect(closing)
        return items

    def primary(self) -> Expression:
        kind, token, position = self.tokens[self.at]
        self.at += 1
        if kind == "number":
            if token.isdigit():
                return const(int(token) if len(token) < 20 else 2**63)
            return const(float(token))
        if kind == "name":
            if token in _LITERALS:
                return const(_LITERALS[token])
            if token in _FUNCTIONS:
                self.expect("(")
                items = self.nested(self.arguments, position, ")")
                if len(items) != _FUNCTIONS[token].arity:
                    raise self.error(f"{token} takes {_FUNCTIONS[token].arity} arguments, got {len(items)}", position)
                return call(token, *items)
            if self.peek("("):
                raise self.error(f"unknown function {token!r:.40}", position)
            if len(token) > _MAX_NAME or not _NAME.match(token):
                raise self.error(f"{token!r:.40} is not a name", position)
            if self.peek("["):
                self.at += 1
                return read(token, *self.nested(self.arguments, position, "]"))
            return var(token)
        if kind == "symbol" and token == "(":
            inner = self.nested(self.binary, position, 1)
            self.expect(")")
            return inner
        raise self.error("expected a number, a name or '('", position)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Expression:
    try:
        return _Parser(text).parse()
    except ExpressionError as error:
        # Without the parser's own frames, of which hostile nesting makes hundreds.
        raise error.with_traceback(None) from None


def parse(text: str) -> Expression:
    """The expression that `text` spells; cached.

    Raises: ExpressionError, with the column, for anything outside the grammar, too long, or nested too deeply.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"expected a text, got {type(text).__name__}")
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"expression of {len(text)} characters; at most {MAX_TEXT} are accepted")
    return _parse(text)


def _number_text(value: Number) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _text(expr: Expression) -> str:
    """Canonical text: fewest parentheses, except around comparisons under & and |, which readers expect."""

    def child(node: Expression, minimum: int) -> str:
        level = _PRECEDENCE.get(node.op, _PRIMARY)
        if node.op == "const" and _number_text(node.value).startswith("-"):
            level = _PRECEDENCE["neg"]
        return f"({_text(node)})" if level < minimum else _text(node)

    op, args = expr.op, expr.args
    if op == "const":
        return _number_text(expr.value)
    if op == "var":
        return expr.value
    if op == "read":
        return f"{expr.value}[{', '.join(map(_text, args))}]"
    if op in ("neg", "not"):
        return ("-" if op == "neg" else "~") + child(args[0], 6)
    if op in _BINARY:
        level = _PRECEDENCE[op]
        left, right = level, level + 1
        if op in _COMPARISONS:
            left = right
        if op in "&|":
            left = level if args[0].op == op else 4
            right = 4
        return f"{child(args[0], left)} {op} {child(args[1], right)}"
    return f"{op}({', '.join(map(_text, args))})"


# ---------------------------------------------------------------------------------------------------------------------
# Kinds
# ---------------------------------------------------------------------------------------------------------------------

_RANK = {"bool": 0, "int": 1, "float": 2}


def kind_of(expr: Expression, kinds: Mapping[str, str] | None = None) -> str:
    """ "bool", "int" or "float".

    Args:
        kinds: kind of variables and of the tensors read; by default b, h, q and k are integers, all else is float.
    """
    return _kind(expr, kinds or {}, {})


def _kind(expr: Expression, kinds: Mapping[str, str], memo: dict[Expression, str]) -> str:
    if expr in memo:
        return memo[expr]
    op = expr.op
    if op == "const":
        result = type(expr.value).__name__
    elif op in ("var", "read"):
        result = kinds.get(expr.value, "int" if expr.value in ("b", "h", "q", "k") else "float")
    elif op in ("not", "&", "|", *_COMPARISONS):
        result = "bool"
    else:
        operands = [_kind(a, kinds, memo) for a in expr.args]
        rule = "float" if op == "/" else _FUNCTIONS[op].kind if op in _FUNCTIONS else "same"
        if rule == "where":
            result = max(operands[1:], key=_RANK.__getitem__)
        else:
            result = "float" if rule == "float" else max([*operands, "int"], key=_RANK.__getitem__)
    memo[expr] = result
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------

_SCALAR_OPERATORS: dict[str, Callable[..., Any]] = {
    "neg": lambda a: -a,
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


def _true_divide(a: Number, b: Number) -> float:
    if b == 0:
        return math.nan if a == 0 or a != a else math.copysign(math.inf, a) * math.copysign(1.0, b)
    return a / b


def _scalar(op: str, args: Sequence[Number]) -> Number:
    """One operation on Python numbers, with torch's results for division by zero and overflow."""
    if op == "not":
        return not args[0]
    if op == "&":
        return bool(args[0]) and bool(args[1])
    if op == "|":
        return bool(args[0]) or bool(args[1])
    if op == "/":
        return _true_divide(args[0], args[1])
    numbers = [int(a) if isinstance(a, bool) else a for a in args]
    if op in _SCALAR_OPERATORS:
        return _SCALAR_OPERATORS[op](*numbers)
    function = _FUNCTIONS[op]
    if function.kind == "where":
        return function.scalar(*args)
    return function.scalar(*(float(a) if function.kind == "float" else a for a in numbers))


def _as_bool(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value if value.dtype == torch.bool else value != 0
    return bool(value)


def _counted(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(torch.int64) if value.dtype == torch.bool else value
    return int(value) if isinstance(value, bool) else value


def _tensor(op: str, args: Sequence[Any], dtype: torch.dtype) -> Any:
    """One operation with at least one tensor among its operands.

    Python numbers keep the tensor's dtype; integers that must become floats become `dtype`.
    """
    if op == "not":
        return torch.logical_not(args[0])
    if op in ("&", "|"):
        left, right = _as_bool(args[0]), _as_bool(args[1])
        return left & right if op == "&" else left | right
    if op == "where":
        if not isinstance(args[0], torch.Tensor):
            return args[1] if args[0] else args[2]
        condition, a, b = _as_bool(args[0]), args[1], args[2]
        if float in (type(a), type(b)):
            # torch would round a number to the default dtype, unless the other branch is a floating tensor.
            a, b = (
                torch.full((), v, dtype=dtype, device=condition.device)
                if isinstance(v, float)
                else v.to(dtype)
                if isinstance(v, torch.Tensor) and not v.is_floating_point()
                else v
                for v in (a, b)
            )
        return torch.where(condition, a, b)
    # Booleans count as integers: torch itself refuses to subtract or negate them.
    numbers: list[Any] = [_counted(a) for a in args]
    if op in _COMPARISONS:
        return _SCALAR_OPERATORS[op](*numbers)
    function = _FUNCTIONS.get(op)
    # Explicitly, because torch would turn integers into the default dtype, whatever the other tensors have.
    if op == "/" or (function and function.kind == "float") or any(isinstance(a, float) for a in numbers):
        numbers = [a.to(dtype) if isinstance(a, torch.Tensor) and not a.is_floating_point() else a for a in numbers]
    if op in _SCALAR_OPERATORS:
        return _SCALAR_OPERATORS[op](*numbers)
    if function is None:
        return numbers[0] / numbers[1]
    if op in ("min", "max"):
        reference = next(a for a in numbers if isinstance(a, torch.Tensor))
        full = functools.partial(torch.full, (), dtype=torch.result_type(*numbers), device=reference.device)
        return function.tensor(*(a if isinstance(a, torch.Tensor) else full(a) for a in numbers))
    if op == "floor" and not numbers[0].is_floating_point():
        return numbers[0]
    return function.tensor(*numbers)


@functools.lru_cache(maxsize=1024)
def _repeated(roots: tuple[Expression, ...]) -> frozenset[Expression]:
    """Inner nodes that occur more than once under `roots`: the only results worth keeping while evaluating."""
    seen: set[Expression] = set()
    twice: set[Expression] = set()

    def walk(node: Expression) -> None:
        if not node.args:
            return
        if node in seen:
            twice.add(node)
            return
        seen.add(node)
        for arg in node.args:
            walk(arg)

    for root in roots:
        walk(root)
    return frozenset(twice)


class _Evaluator:
    def __init__(self, roots: tuple[Expression, ...], env: Mapping[str, Any]):
        self.env = env
        self.keep = _repeated(roots)
        self.memo: dict[Expression, Any] = {}
        self.dtype = torch.get_default_dtype()
        used = [env.get(name) for name in sorted(frozenset[str]().union(*(r.variables for r in roots)))]
        floats = [v.dtype for v in used if isinstance(v, torch.Tensor) and v.is_floating_point()]
        if floats:
            self.dtype = functools.reduce(torch.promote_types, floats)

    def lookup(self, name: str) -> Any:
        try:
            return self.env[name]
        except KeyError:
            raise ExpressionError(f"no value for {name!r}; given: {', '.join(sorted(self.env)) or 'none'}") from None

    def value(self, node: Expression, device: torch.device | str | None = None) -> torch.Tensor:
        """`run`, with a Python number made a tensor."""
        result = self.run(node)
        if isinstance(result, torch.Tensor):
            return result
        return torch.tensor(result, dtype=self.dtype if isinstance(result, float) else None, device=device)

    def run(self, node: Expression) -> Any:
        """A tensor, or a Python number where no tensor is involved."""
        if node in self.memo:
            return self.memo[node]
        if node.op == "const":
            return node.value
        if node.op == "var":
            return self.lookup(node.value)
        args = [self.run(a) for a in node.args]
        if node.op == "read":
            table = self.lookup(node.value)
            if not isinstance(table, torch.Tensor) or table.dim() != len(args):
                rank = table.dim() if isinstance(table, torch.Tensor) else type(table).__name__
                raise ExpressionError(f"{node} needs a tensor of rank {len(args)}, got {rank}")
            result = table[tuple(i.long() if isinstance(i, torch.Tensor) else int(i) for i in args)]
        elif any(isinstance(a, torch.Tensor) for a in args):
            result = _tensor(node.op, args, self.dtype)
        else:
            result = _scalar(node.op, args)
        if node in self.keep:
            self.memo[node] = result
        return result


def evaluate(expr: Expression, env: Mapping[str, Any]) -> torch.Tensor:
    """The value of `expr`, by torch operators (named functions run the fused operator, e.g. F.gelu).

    Args:
        env: tensors or Python numbers by name; they broadcast. A read indexes env[name] with broadcast long indices.
    Returns: a tensor, of the dtype torch's promotion gives; 0-d where no tensor is involved.
    Raises: ExpressionError for a missing name or a read of the wrong rank.
    """
    return _Evaluator((expr,), env).value(expr)


def mask_tensor(
    expr_text: str,
    expr_in: Sequence[torch.Tensor],
    batch: int,
    heads: int,
    n_q: int,
    n_k: int,
    device: torch.device | str | None = None,
) -> torch.Tensor | None:
    """A mask expression as a tensor.

    Args:
        expr_text: the expression; "" means no mask. expr_in: the tensors t0, t1, ... it reads.
        batch, heads, n_q, n_k: extents of b, h, q and k.
    Returns: 4-d, broadcastable to [batch, heads, n_q, n_k], with size 1 where the expression does not depend on the
        index; bool (True = allowed) or float (added to the logits); None for "".
    Raises: ExpressionError.
    """
    if not expr_text:
        return None
    env: dict[str, Any] = {f"t{i}": t for i, t in enumerate(expr_in)}
    for axis, (name, extent) in enumerate(zip("bhqk", (batch, heads, n_q, n_k), strict=True)):
        env[name] = torch.arange(extent, device=device).view([-1 if i == axis else 1 for i in range(4)])
    expr = parse(expr_text)
    mask = _Evaluator((expr,), env).value(expr, device)
    if mask.dim() > 4:
        raise ExpressionError(f"mask {expr_text!r:.80} has rank {mask.dim()}, expected at most 4")
    if not mask.is_floating_point() and mask.dtype != torch.bool:
        mask = mask.to(torch.get_default_dtype())  # an integer mask is added to the logits
    return mask.view((1,) * (4 - mask.dim()) + tuple(mask.shape))


# ---------------------------------------------------------------------------------------------------------------------
# Derivatives
# ---------------------------------------------------------------------------------------------------------------------

_ZERO, _ONE, _HALF = const(0.0), const(1.0), const(0.5)
_INV_SQRT_2 = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327
_SQRT_2_PI = 0.7978845608028654


def _is(node: Expression, value: float) -> bool:
    return node.op == "const" and not isinstance(node.value, bool) and node.value == value


def _add(a: Expression, b: Expression) -> Expression:
    if _is(a, 0):
        return b
    if _is(b, 0):
        return a
    if a.op == b.op == "const":
        return const(_scalar("+", (a.value, b.value)))
    return a - b.args[0] if b.op == "neg" else a + b


def _neg(a: Expression) -> Expression:
    return a.args[0] if a.op == "neg" else -a


def _sub(a: Expression, b: Expression) -> Expression:
    if _is(b, 0):
        return a
    if _is(a, 0):
        return _neg(b)
    if a.op == b.op == "const":
        return const(_scalar("-", (a.value, b.value)))
    return a - b


def _mul(a: Expression, b: Expression) -> Expression:
    if _is(a, 0) or _is(b, 0):
        return _ZERO
    if _is(a, 1):
        return b
    if _is(b, 1):
        return a
    if a.op == b.op == "const":
        return const(_scalar("*", (a.value, b.value)))
    if _is(a, -1):
        return _neg(b)
    if _is(b, -1):
        return _neg(a)
    if a.op == "neg":
        return _neg(_mul(a.args[0], b))
    if b.op == "neg":
        return _neg(_mul(a, b.args[0]))
    return a * b


def _div(a: Expression, b: Expression) -> Expression:
    if _is(a, 0):
        return _ZERO
    return a if _is(b, 1) else a / b


def _where(condition: Expression, a: Expression, b: Expression) -> Expression:
    return a if a == b else call("where", condition, a, b)


def _gelu_tanh_derivative(x: Expression) -> Expression:
    tanh = call("tanh", _SQRT_2_PI * (x + 0.044715 * x * x * x))
    slope = _SQRT_2_PI * (1.0 + 0.134145 * x * x)
    return 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope


def _gelu_derivative(x: Expression) -> Expression:
    return 0.5 * (1.0 + call("erf", x * _INV_SQRT_2)) + x * (_INV_SQRT_2PI * call("exp", -0.5 * x * x))


def _silu_derivative(x: Expression) -> Expression:
    gate = call("sigmoid", x)
    return gate * (1.0 + x * (1.0 - gate))


# d f(u) / d u for the functions of one argument; None means zero almost everywhere.
_UNARY_DERIVATIVES: dict[str, Callable[[Expression], Expression] | None] = {
    "exp": lambda u: call("exp", u),
    "log": lambda u: 1.0 / u,
    "log1p": lambda u: 1.0 / (1.0 + u),
    "expm1": lambda u: call("exp", u),
    "sqrt": lambda u: 0.5 / call("sqrt", u),
    "rsqrt": lambda u: -0.5 * call("rsqrt", u) / u,
    "abs": lambda u: call("sign", u),
    "sign": None,
    "floor": None,
    "erf": lambda u: 1.1283791670955126 * call("exp", -call("square", u)),
    "tanh": lambda u: 1.0 - call("square", call("tanh", u)),
    "sigmoid": lambda u: call("sigmoid", u) * (1.0 - call("sigmoid", u)),
    "softplus": lambda u: call("sigmoid", u),
    "relu": lambda u: call("where", u > 0, 1.0, 0.0),
    "silu": _silu_derivative,
    "gelu": _gelu_derivative,
    "gelu_tanh": _gelu_tanh_derivative,
    "sin": lambda u: call("cos", u),
    "cos": lambda u: -call("sin", u),
    "square": lambda u: 2.0 * u,
}


def _pow_derivative(base: Expression, exponent: Expression, d_base: Expression, d_exponent: Expression) -> Expression:
    result = _ZERO
    if not _is(d_base, 0):
        if exponent.op == "const":
            power = exponent.value
            lower = _ONE if power == 1 else base if power == 2 else call("pow", base, power - 1)
            slope = _mul(const(float(power)), lower)
        else:
            slope = call("where", call("==", exponent, 0), 0.0, exponent * call("pow", base, exponent - 1))
        result = _mul(slope, d_base)
    if not _is(d_exponent, 0):
        # torch: no slope in the exponent where the base is zero and the exponent is not negative.
        at_zero = call("==", base, 0) & (exponent >= 0)
        slope = call("where", at_zero, 0.0, call("pow", base, exponent) * call("log", base))
        result = _add(result, _mul(slope, d_exponent))
    return result


@functools.lru_cache(maxsize=1024)
def derivative(expr: Expression, name: str) -> Expression:
    """d expr / d name, simplified.

    Follows torch's conventions: ties of min and max share the slope equally, abs has slope 0 at 0, comparisons, sign
    and floor have slope 0. A tensor that is read may be differentiated when all its reads share one index (the result
    is the slope with respect to the element read).

    Raises: ExpressionError if a tensor `name` is read at two different places, or the result would be too large.
    """
    places = {node for node in _walk(expr) if node.op == "read" and node.value == name}
    if len(places) > 1:
        raise ExpressionError(f"{name} is read at {len(places)} places; its derivative is not one expression")
    memo: dict[Expression, Expression] = {}

    def d(node: Expression) -> Expression:
        if node not in memo:
            memo[node] = rule(node)
        return memo[node]

    def rule(node: Expression) -> Expression:
        op, args = node.op, node.args
        if op in ("var", "read"):
            return _ONE if node.value == name else _ZERO
        if name not in node.variables or op in ("const", "not", "&", "|", *_COMPARISONS):
            return _ZERO
        if op == "neg":
            return _neg(d(args[0]))
        if op == "+":
            return _add(d(args[0]), d(args[1]))
        if op == "-":
            return _sub(d(args[0]), d(args[1]))
        if op == "*":
            return _add(_mul(d(args[0]), args[1]), _mul(args[0], d(args[1])))
        if op == "/":
            over = _div(d(args[0]), args[1])
            return over if _is(d(args[1]), 0) else _sub(over, _mul(node, _div(d(args[1]), args[1])))
        if op == "where":
            return _where(args[0], d(args[1]), d(args[2]))
        if op in ("min", "max"):
            a, b = args
            wins, da, db = (a < b if op == "min" else a > b), d(a), d(b)
            tied = _mul(_HALF, _add(da, db))
            return _where(wins, da, _where(call("==", a, b), tied, db))
        if op == "pow":
            return _pow_derivative(args[0], args[1], d(args[0]), d(args[1]))
        if op == "mod":
            return _sub(d(args[0]), _mul(call("floordiv", *args), d(args[1])))
        if op == "floordiv":
            return _ZERO
        slope = _UNARY_DERIVATIVES[op]
        inner = d(args[0])
        return _ZERO if slope is None or _is(inner, 0) else _mul(slope(args[0]), inner)

    return d(expr)


def _walk(expr: Expression) -> Iterable[Expression]:
    seen: set[Expression] = set()
    stack = [expr]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.args)
            yield node


# Activations whose backward exists as one fused ATen operator.
_FUSED_BACKWARD: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": lambda grad, x: torch.ops.aten.silu_backward(grad, x),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


def _fused_form(expr: Expression) -> tuple[str, str, str | None] | None:
    """(function, argument, gate) where `expr` is function(argument) or that times another variable; None otherwise."""
    if expr.op in _FUSED_BACKWARD and expr.args[0].op == "var":
        return expr.op, expr.args[0].value, None
    if expr.op == "*":
        for inner, gate in (expr.args, expr.args[::-1]):
            form = _fused_form(inner) if inner.op in _FUSED_BACKWARD else None
            if form is not None and gate.op == "var" and gate.value != form[1]:
                return form[0], form[1], gate.value
    return None


def vjp(expr: Expression, env: Mapping[str, Any], names: Sequence[str], grad: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of `names` given the gradient of the value of `expr`.

    Args:
        env: as for `evaluate`. grad: of the shape of the value.
    Returns: one tensor per name, reduced to the shape of env[name] (a variable that was broadcast, such as a vector of
        slopes). Fused ATen backward operators serve gelu, gelu_tanh, silu and relu, alone or times another input.
    Raises: ExpressionError as `derivative` and `evaluate`; also for a name that is read by index.
    """
    fused = _fused_form(expr)
    partial: dict[str, torch.Tensor] = {}
    if fused is not None:
        function, argument, gate = fused
        x = env[argument]
        if isinstance(x, torch.Tensor) and x.shape == grad.shape:
            if argument in names:
                upstream = grad if gate is None else grad * env[gate]
                partial[argument] = _FUSED_BACKWARD[function](upstream, x)
            if gate is not None and gate in names:
                partial[gate] = grad * _FUNCTIONS[function].tensor(x)
    remaining = [name for name in names if name not in partial]
    slopes = {name: derivative(expr, name) for name in remaining}
    evaluator = _Evaluator(tuple(slopes.values()), env)
    ranks = read_ranks(expr) if remaining else {}
    for name in remaining:
        if name in ranks:
            raise ExpressionError(f"the gradient of {name}, which is read by index, is not supported")
        partial[name] = grad * evaluator.run(slopes[name])
    results = []
    for name in names:
        value, result = env[name], partial[name]
        if isinstance(value, torch.Tensor):
            result = result.sum_to_size(value.shape).to(value.dtype)
        results.append(result)
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Printers
# ---------------------------------------------------------------------------------------------------------------------


def _emit_name(name: str, names: Mapping[str, Emitter], index: Sequence[str]) -> str:
    try:
        emitter = names[name]
    except KeyError:
        raise ExpressionError(f"no identifier for {name!r}; given: {', '.join(sorted(names)) or 'none'}") from None
    if callable(emitter):
        return emitter(*index)
    return emitter.format(*index) if index else emitter


class _Printer:
    """Fully parenthesised output, so that no precedence of the target language matters."""

    def __init__(self, names: Mapping[str, Emitter], kinds: Mapping[str, str] | None):
        self.names = names
        self.kinds = kinds or {}
        self.kind_memo: dict[Expression, str] = {}

    def kind(self, node: Expression) -> str:
        return _kind(node, self.kinds, self.kind_memo)

    def constant(self, value: Number) -> str:
        raise NotImplementedError

    def convert(self, text: str, source: str, target: str) -> str:
        """`text`, of kind `source`, as a value of kind `target`."""
        raise NotImplementedError

    def leaf(self, text: str, kind: str) -> str:
        """`text`, an identifier given by the caller, as a value of its kind."""
        return text

    def compose(self, node: Expression, args: list[str]) -> str:
        """Target text of an operator or function, with the operands converted."""
        raise NotImplementedError

    def operand(self, node: Expression, target: str) -> str:
        if node.op == "const" and target != "bool":
            return self.constant(float(node.value) if target == "float" else int(node.value))
        return self.convert(self.run(node), self.kind(node), target)

    def run(self, node: Expression) -> str:
        op, args = node.op, node.args
        if op == "const":
            return self.constant(node.value)
        if args and op != "read" and not node.variables:
            return self.constant(_scalar_value(node))
        if op in ("var", "read"):
            text = _emit_name(node.value, self.names, [self.operand(a, "int") for a in args])
            return self.leaf(text, self.kind(node))
        if op in ("not", "&", "|"):
            return self.compose(node, [self.operand(a, "bool") for a in args])
        if op == "where":
            target = self.kind(node)
            return self.compose(node, [self.operand(args[0], "bool"), *(self.operand(a, target) for a in args[1:])])
        if op in _COMPARISONS or op not in _FUNCTIONS:
            target = max([*(self.kind(a) for a in args), "int"], key=_RANK.__getitem__)
            target = "float" if op == "/" else target
        else:
            target = self.kind(node)
        return self.compose(node, [self.operand(a, target) for a in args])


def _scalar_value(node: Expression) -> Number:
    """Value of an expression without variables."""
    return node.value if node.op == "const" else _scalar(node.op, [_scalar_value(a) for a in node.args])


class _TritonPrinter(_Printer):
    def constant(self, value: Number) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        return f"({value!r})" if not isinstance(value, bool) and (value < 0) else repr(value)

    def convert(self, text: str, source: str, target: str) -> str:
        if source == target:
            return text
        if target == "bool":
            return f"({text} != 0)"
        return f"{text}.to(tl.{'float32' if target == 'float' else 'int32'})"

    def compose(self, node: Expression, args: list[str]) -> str:
        if node.op == "neg":
            return f"(-{args[0]})"
        if node.op == "not":
            return f"(~{args[0]})"
        varies = [bool(a.variables) for a in node.args]
        if (node.op in ("square", "pow") and varies[0] or node.op == "*" and all(varies)) and self.kind(node) == "int":
            args = [f"tl.cast({args[0]}, tl.int64)", *args[1:]]  # products of positions pass 2^31 in long contexts
        if node.op in _BINARY:
            return f"({args[0]} {node.op} {args[1]})"
        if node.op == "pow" and node.args[1].op == "const" and node.args[1].value in (0.5, -0.5, -1, 1, 2, 3, 4):
            return _triton_power(args[0], node.args[1].value)
        return f"{_FUNCTIONS[node.op].triton}({', '.join(args)})"


def _triton_power(base: str, exponent: Number) -> str:
    """Common constant powers without a logarithm."""
    fixed = {0.5: "spt_sqrt({0})", -0.5: "tl.rsqrt({0})", -1: "(1.0 / {0})", 1: "{0}", 2: "spt_square({0})"}
    fixed.update({3: "({0} * spt_square({0}))", 4: "spt_square(spt_square({0}))"})
    return fixed[exponent].format(base)


def triton_source(expr: Expression, names: Mapping[str, Emitter], kinds: Mapping[str, str] | None = None) -> str:
    """`expr` as one Triton expression on float32 and int32 values; products of integers that both vary are int64.

    Args:
        names: target identifier per variable; for a tensor a format with {0}, {1}, ... for its indices, or a function
            of the index texts. Only these texts, operators, numbers and the helpers of `templates/_macros.jinja`
            (spt_tanh and the like, which avoid libdevice) appear in the result.
        kinds: as for `kind_of`; a value of kind "bool" must be int1 in the target.
    Raises: ExpressionError for a variable without an identifier.
    """
    return _TritonPrinter(names, kinds).run(expr)


CPP_PRELUDE = """\
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
template <class A, class B> using spt_common = typename std::common_type<A, B>::type;
template <class T> inline T spt_abs(T x) { return x < T(0) ? -x : (x == T(0) ? T(0) : x); }
template <class T> inline T spt_sign(T x) { return T((T(0) < x) - (x < T(0))); }
template <class T> inline T spt_floor(T x) { return std::is_integral<T>::value ? x : T(std::floor(x)); }
template <class T> inline T spt_square(T x) { return x * x; }
template <class T> inline T spt_rsqrt(T x) { return T(1) / std::sqrt(x); }
template <class T> inline T spt_relu(T x) { return x < T(0) ? T(0) : x; }
template <class T> inline T spt_sigmoid(T x) { return T(1) / (T(1) + std::exp(-x)); }
template <class T> inline T spt_softplus(T x) { return x > T(20) ? x : std::log1p(std::exp(x)); }
template <class T> inline T spt_silu(T x) { return x / (T(1) + std::exp(-x)); }
template <class T> inline T spt_gelu(T x) { return T(0.5) * x * (T(1) + std::erf(x * T(0.7071067811865476))); }
template <class T> inline T spt_gelu_tanh(T x) {
  return T(0.5) * x * (T(1) + std::tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}
template <class A, class B> inline spt_common<A, B> spt_min(A a, B b) {
  return a != a ? a : (b != b ? b : (a < b ? a : b));
}
template <class A, class B> inline spt_common<A, B> spt_max(A a, B b) {
  return a != a ? a : (b != b ? b : (a > b ? a : b));
}
template <class T> inline T spt_floordiv(T a, T b) {
  if constexpr (std::is_integral<T>::value) {
    T quotient = a / b;
    return quotient - T((a % b != 0) && ((a < 0) != (b < 0)));
  } else {
    return std::floor(a / b);
  }
}
template <class T> inline T spt_mod(T a, T b) {
  if constexpr (std::is_integral<T>::value) {
    T rest = a % b;
    return rest + ((rest != 0 && ((rest < 0) != (b < 0))) ? b : T(0));
  } else {
    T rest = std::fmod(a, b);
    return rest + ((rest != T(0) && ((rest < T(0)) != (b < T(0)))) ? b : T(0));
  }
}
"""


class _CppPrinter(_Printer):
    def __init__(self, names: Mapping[str, Emitter], kinds: Mapping[str, str] | None, real: str):
        super().__init__(names, kinds)
        self.real = real

    def constant(self, value: Number) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, int):
            # The most negative integer has no literal of its own in C++.
            return "INT64_MIN" if value == -(2**63) else f"int64_t({value}LL)"
        if math.isnan(value):
            return f"std::numeric_limits<{self.real}>::quiet_NaN()"
        if math.isinf(value):
            return f"({'-' if value < 0 else ''}std::numeric_limits<{self.real}>::infinity())"
        return f"{self.real}({value!r})"

    def convert(self, text: str, source: str, target: str) -> str:
        if source == target:
            return text
        if target == "bool":
            return f"({text} != 0)"
        return f"{self.real if target == 'float' else 'int64_t'}({text})"

    def leaf(self, text: str, kind: str) -> str:
        # The caller's identifiers may be narrower (int32, float) than the type computed in.
        target = {"bool": "bool", "int": "int64_t", "float": self.real}[kind]
        return f"{target}({text})"

    def compose(self, node: Expression, args: list[str]) -> str:
        if node.op == "neg":
            return f"(-{args[0]})"
        if node.op == "not":
            return f"(!{args[0]})"
        if node.op in ("&", "|"):
            return f"({args[0]} {node.op * 2} {args[1]})"
        if node.op in _BINARY:
            return f"({args[0]} {node.op} {args[1]})"
        if node.op == "where":
            return f"({args[0]} ? {args[1]} : {args[2]})"
        return f"{_FUNCTIONS[node.op].cpp}({', '.join(args)})"


def cpp_source(
    expr: Expression, names: Mapping[str, Emitter], kinds: Mapping[str, str] | None = None, *, real: str = "float"
) -> str:
    """`expr` as one C++17 expression; needs `CPP_PRELUDE` in the file.

    Args:
        names, kinds: as for `triton_source`; integers are computed as int64_t, floats as `real` ("float" or "double").
    Raises: ExpressionError for a variable without an identifier.
    """
    return _CppPrinter(names, kinds, real).run(expr)
