"""The small changes of a source file whose effect a test should notice (mutants), made from its syntax tree.

What is not changed, because a test could only repeat it: docstrings, annotations, imports, decorators, assertions, the
words of errors, warnings, help texts and descriptions, published numbers, and what runs only as `__main__`.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator

COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
COMPARISONS |= {"in": "not in", "not in": "in", "is": "is not", "is not": "is"}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "/", "%": "*", "**": "*", "@": "*"}
OPERATORS |= {"&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<"}
SYMBOLS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.In: "in"}
SYMBOLS |= {ast.NotIn: "not in", ast.Is: "is", ast.IsNot: "is not", ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
SYMBOLS |= {ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**", ast.MatMult: "@", ast.BitAnd: "&"}
SYMBOLS |= {ast.BitOr: "|", ast.BitXor: "^", ast.LShift: "<<", ast.RShift: ">>", ast.And: "and", ast.Or: "or"}
PAIRS = [("min", "max"), ("any", "all"), ("minimum", "maximum"), ("zeros", "ones"), ("floor", "ceil"), ("sum", "max")]
PAIRS += [("argmin", "argmax"), ("startswith", "endswith"), ("lower", "upper"), ("zeros_like", "ones_like")]
NAMES = dict(PAIRS) | {b: a for a, b in PAIRS if a != "sum"} | {"mean": "sum", "append": "extend"}
# Calls of one argument, or methods of none, that are replaced by what they are given.
UNWRAPPED = {"sorted", "reversed", "abs", "exp", "log", "sqrt", "rsqrt", "square", "sigmoid", "softmax", "log_softmax"}
UNWRAPPED |= {"softplus", "tanh", "gelu", "relu", "silu", "stop_gradient", "cumsum", "strip", "lower", "upper"}
MESSAGES = {"print", "warn", "warning", "info", "TypeVar", "cast", "add_argument", "Published"}
WORDS = {"help", "description", "metavar", "epilog", "fix", "problem", "note", "strict"}  # `strict` asserts
DESCRIBED = {"Field": 1}  # so many of the first arguments are words
DESCRIPTIONS = {"METRICS", "problem", "fix"}  # names of words


@dataclasses.dataclass(frozen=True, order=True)
class Mutant:
    """One change of a file: bytes `start` to `end` become `new`.

    function: the dotted name of the function or class around it, "" at the top of the file.
    before, after: the whole lines that it changes, without their indentation.
    """

    start: int
    end: int
    new: str
    function: str
    line: int
    before: str
    after: str

    def apply(self, source: str) -> str:
        """Return the changed source."""
        raw = source.encode()
        return (raw[: self.start] + self.new.encode() + raw[self.end :]).decode()


def mutants(source: str) -> list[Mutant]:
    """Return the mutants of a file in the order of their places."""
    raw, tree = source.encode(), ast.parse(source)
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    place = functools.partial(_place, starts)
    changes = {(*change, function) for change, function in _statements(tree.body, "", raw, place)}
    return [_mutant(raw, starts, *change) for change in sorted(changes)]


Change = tuple[int, int, str]


def _place(starts: list[int], node: ast.AST) -> tuple[int, int]:
    """Return where a node begins and ends, in bytes of the file."""
    first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
    return first, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]


def _mutant(raw: bytes, starts: list[int], start: int, end: int, new: str, function: str) -> Mutant:
    first = max(index for index, begin in enumerate(starts) if begin <= start)
    from_, to = starts[first], raw.find(b"\n", end)
    to = len(raw) if to < 0 else to
    after = raw[from_:start] + new.encode() + raw[end:to]
    words = [" ".join(text.decode().split()) for text in (raw[from_:to], after)]
    return Mutant(start, end, new, function, first + 1, *words)


def _statements(body: list[ast.stmt], function: str, raw: bytes, place) -> Iterator[tuple[Change, str]]:  # type: ignore[no-untyped-def]
    """Yield the changes of statements, each with the name of the function that it is in."""
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                inner = f"{function}.{node.name}" if function else node.name
                if not isinstance(node, ast.ClassDef) and not _only_declares(node.body):
                    for default in [*node.args.defaults, *node.args.kw_defaults]:
                        if default is not None:
                            yield from ((change, inner) for change in _expression(default, raw, place))
                yield from _statements(node.body, inner, raw, place)
                continue
            case ast.Import() | ast.ImportFrom() | ast.Assert() | ast.Raise():
                continue
            case ast.Assign(targets=[ast.Name(id=name)]) if name in DESCRIPTIONS:
                continue
            case ast.Expr(value=ast.Constant()) | ast.Expr(value=ast.Call(func=ast.Name(id="print"))):
                continue
            case ast.If() if ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
                continue
            case ast.If() if _guards(node):
                yield (*place(node.test), "False"), function
            case ast.If():
                yield (*place(node.test), f"not ({_text(raw, place(node.test))})"), function
            case ast.Expr(value=ast.Call()):
                yield (*place(node), "pass"), function
            case ast.AugAssign(op=op):
                between = (place(node.target)[1], place(node.value)[0])
                yield from ((change, function) for change in _swapped(raw, between, OPERATORS, SYMBOLS[type(op)]))
            case ast.Break() | ast.Continue():
                yield (*place(node), "continue" if isinstance(node, ast.Break) else "break"), function
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr) and child is not getattr(node, "annotation", None):
                yield from ((change, function) for change in _expression(child, raw, place))
            elif isinstance(child, ast.withitem):
                yield from ((change, function) for change in _expression(child.context_expr, raw, place))
        inner_bodies = [getattr(node, name, []) for name in ("body", "orelse", "finalbody")]
        inner_bodies += [part.body for name in ("handlers", "cases") for part in getattr(node, name, [])]
        for inner_body in inner_bodies:
            yield from _statements(inner_body, function, raw, place)


def _only_declares(body: list[ast.stmt]) -> bool:
    """Tell whether a body is a docstring or `...` alone, as in a Protocol, whose defaults nothing reads."""
    return all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body)


def _guards(node: ast.If) -> bool:
    """Tell whether an `if` only leaves: its removal is another change than its opposite, which anything notices."""
    return not node.orelse and isinstance(node.body[-1], ast.Raise | ast.Return | ast.Continue | ast.Break)


def _text(raw: bytes, span: tuple[int, int]) -> str:
    return raw[span[0] : span[1]].decode()


def _expression(node: ast.expr, raw: bytes, place) -> Iterator[Change]:  # type: ignore[no-untyped-def]
    """Yield the changes of an expression and of what it holds."""
    match node:
        case ast.JoinedStr():  # positions within it are wrong before Python 3.12
            yield (*place(node), '"XX"')
            return
        case ast.Constant():
            yield from ((*place(node), new) for new in _constant(node.value))
            return
        case ast.Call() if _name(node.func) in MESSAGES or _name(node.func).endswith(("Error", "Warning")):
            return
        case ast.Call():
            yield from _call(node, raw, place)
        case ast.BinOp(left=left, op=op, right=right):
            yield from _swapped(raw, (place(left)[1], place(right)[0]), OPERATORS, SYMBOLS[type(op)])
        case ast.BoolOp(op=op, values=values):
            for one, other in zip(values, values[1:], strict=False):
                yield from _swapped(
                    raw, (place(one)[1], place(other)[0]), {"and": "or", "or": "and"}, SYMBOLS[type(op)]
                )
        case ast.Compare(left=left, ops=ops, comparators=others):
            for one, operator, other in zip([left, *others], ops, others, strict=False):
                yield from _swapped(raw, (place(one)[1], place(other)[0]), COMPARISONS, SYMBOLS[type(operator)])
        case ast.UnaryOp(operand=operand):
            yield (*place(node), f"({_text(raw, place(operand))})")
        case ast.IfExp(test=test):
            yield (*place(test), f"(not ({_text(raw, place(test))}))")
        case ast.Slice(lower=lower, upper=upper):
            for bound in (lower, upper):
                if bound is not None and not isinstance(bound, ast.Constant):
                    yield (*place(bound), "")
        case ast.Lambda():
            yield from _expression(node.body, raw, place)
            return
    words = node.args[: DESCRIBED.get(_name(node.func), 0)] if isinstance(node, ast.Call) else []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr) and child not in words:
            yield from _expression(child, raw, place)
        elif isinstance(child, ast.keyword) and child.arg not in WORDS:
            yield from _expression(child.value, raw, place)
        elif isinstance(child, ast.comprehension):
            for test in child.ifs:
                yield (*place(test), f"(not ({_text(raw, place(test))}))")
            for part in (child.iter, *child.ifs):
                yield from _expression(part, raw, place)


def _constant(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int | float):  # one more of 1e9 is as good as 1e9
        return [repr(value * 10 if isinstance(value, float) and value >= 1000 else value + 1)]
    return [repr("XX" + value)] if isinstance(value, str) else []


def _name(function: ast.expr) -> str:
    """Return the last part of a function's name: "sum" of `jnp.sum`."""
    return getattr(function, "attr", getattr(function, "id", ""))


def _swapped(raw: bytes, span: tuple[int, int], pairs: dict[str, str], symbol: str) -> Iterator[Change]:
    """Yield the replacement of the operator between two operands, where no comment may hold it too."""
    if symbol in pairs and "#" not in _text(raw, span):
        pattern = rf"\b{symbol}\b".replace(" ", r"\s+") if symbol[0].isalpha() else re.escape(symbol)
        if found := re.search(pattern, _text(raw, span)):
            first = span[0] + len(_text(raw, span)[: found.start()].encode())
            yield first, first + len(found.group().encode()), pairs[symbol]


def _call(node: ast.Call, raw: bytes, place) -> Iterator[Change]:  # type: ignore[no-untyped-def]
    name, start_end = _name(node.func), place(node)
    if name in NAMES:
        end = place(node.func)[1]
        yield end - len(name), end, NAMES[name]
    if name in UNWRAPPED and not node.keywords:
        if len(node.args) == 1 and not isinstance(node.args[0], ast.Starred):
            yield (*start_end, f"({_text(raw, place(node.args[0]))})")
        elif not node.args and isinstance(node.func, ast.Attribute):
            yield (*start_end, _text(raw, place(node.func.value)))
    if name == "where" and len(node.args) == 3:
        one, other = (_text(raw, place(argument)) for argument in node.args[1:])
        yield place(node.args[1])[0], place(node.args[2])[1], f"{other}, {one}"
    for keyword in node.keywords:
        if keyword.arg and keyword.arg not in WORDS:
            start, end = place(keyword)
            comma = re.match(rb"\s*,\s*", raw[end:])
            yield start, end + (comma.end() if comma else 0), ""
