"""What sidecar/ logs, read from its source: each message with its logger, its level and its fields.

Nothing is guessed. A message or fields that cannot be read from the code are an error that names the line, so
that the reference of log fields is whole or not made at all.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

LEVELS = ("debug", "info", "warning", "error", "exception", "critical")
# Stands where a message holds what is only known when it is logged.
OPEN = "…"

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Unreadable(Exception):
    """A call whose message or fields the source does not tell. The message names the place."""


@dataclass(frozen=True, order=True)
class Logged:
    """One message that can be logged; `traceback` tells whether one comes with it."""

    logger: str
    message: str
    level: str
    fields: tuple[str, ...]
    traceback: bool


@dataclass(frozen=True)
class Module:
    """One file, and the functions that each of its nodes stands in, innermost first."""

    path: str
    tree: ast.Module

    @cached_property
    def parents(self) -> dict[ast.AST, ast.AST]:
        return {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def around(self, node: ast.AST) -> Iterator[Function | ast.Module]:
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, Function | ast.Module):
                yield node


class Source:
    """All modules of a package."""

    def __init__(self, root: Path) -> None:
        self.modules = [
            Module(str(file.relative_to(root.parent)), ast.parse(file.read_text(encoding="utf-8"), str(file)))
            for file in sorted(root.rglob("*.py"))
        ]

    def logged(self) -> list[Logged]:
        """Each message once, in the order of loggers, levels as they stand in the code. Raises Unreadable."""
        found = {line for module in self.modules for line in self._of(module)}
        return sorted(found)

    def _of(self, module: Module) -> Iterator[Logged]:
        loggers = _loggers(module.tree)
        for call in ast.walk(module.tree):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            logger = _logger(call.func.value, loggers)
            if logger is None or call.func.attr not in (*LEVELS, "log"):
                continue
            keywords = {keyword.arg: keyword.value for keyword in call.keywords}
            extra = keywords.get("extra")
            fields = () if extra is None else tuple(dict.fromkeys(self._keys(extra, module)))
            levels, message = _levels(call, module)
            for level, known in levels:
                for text in self._texts(message, module, known):
                    yield Logged(
                        logger,
                        text,
                        "error" if level == "exception" else level,
                        fields,
                        level == "exception" or "exc_info" in keywords,
                    )

    # What a message says ---------------------------------------------------------------------------

    def _texts(self, node: ast.expr, module: Module, known: Mapping[str, bool]) -> Iterator[str]:
        """Every text that a message can be; `known` says which conditions hold, since the level does so."""
        match node:
            case ast.Constant(value=str(text)):
                yield text.replace("%s", OPEN).replace("%d", OPEN)
            case ast.JoinedStr(values=parts):
                yield "".join(_fixed(part) for part in parts)
            case ast.IfExp(test=test, body=body, orelse=otherwise):
                holds = known.get(ast.dump(test))
                if holds is not False:
                    yield from self._texts(body, module, known)
                if holds is not True:
                    yield from self._texts(otherwise, module, known)
            case ast.Name(id=name):
                values = list(_assigned(name, node, module))
                for value in values:
                    yield from self._texts(value, module, known)
                if not values:
                    yield OPEN  # given by whoever calls, such as a warning about the environment
            case _:
                raise _unreadable(node, module, "message")

    # Which fields it carries -----------------------------------------------------------------------

    def _keys(self, node: ast.expr, module: Module) -> Iterator[str]:
        match node:
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant):
                        yield str(key.value)
                    elif key is None:
                        yield from self._keys(value, module)
                    else:
                        raise _unreadable(node, module, "field")
            case ast.DictComp(
                key=ast.JoinedStr(values=[ast.Constant(value=str(before)), ast.FormattedValue()]),
                generators=[
                    ast.comprehension(iter=ast.Call(func=ast.Attribute(value=of, attr="items"), args=[]))
                ],
            ):
                yield from (f"{before}{key}" for key in self._keys(of, module))
            case ast.IfExp(body=left, orelse=right) | ast.BinOp(left=left, op=ast.BitOr(), right=right):
                yield from self._keys(left, module)
                yield from self._keys(right, module)
            case ast.BoolOp(values=values):
                for value in values:
                    yield from self._keys(value, module)
            case ast.Call(func=ast.Name(id="dict" | "MappingProxyType"), args=copied, keywords=keywords):
                for value in copied:
                    yield from self._keys(value, module)
                for keyword in keywords:
                    yield from [keyword.arg] if keyword.arg else self._keys(keyword.value, module)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                yield from self._all_of(self._returned(name), node, module)
            case ast.Name(id=name):
                values = list(_assigned(name, node, module))
                yield from self._all_of(values or self._given(name), node, module)
                yield from _put_in(name, node, module)
            case ast.Attribute(attr=name):
                found = [*self._given(name), *self._returned(name), *self._kept(name)]
                yield from self._all_of(found, node, module)
            case _:
                raise _unreadable(node, module, "field")

    def _all_of(
        self, values: Iterable[ast.expr | tuple[ast.expr, Module]], node: ast.expr, module: Module
    ) -> Iterator[str]:
        found = [value if isinstance(value, tuple) else (value, module) for value in values]
        if not found:
            raise _unreadable(node, module, "field")
        for value, place in found:
            if not (isinstance(value, ast.Attribute | ast.Name) and _named(value) == _named(node)):
                yield from self._keys(value, place)

    def _given(self, name: str) -> list[tuple[ast.expr, Module]]:
        """What is passed under this name anywhere: `log_fields=...`."""
        return [
            (keyword.value, module)
            for module in self.modules
            for call in ast.walk(module.tree)
            if isinstance(call, ast.Call)
            for keyword in call.keywords
            if keyword.arg == name
        ]

    def _kept(self, name: str) -> list[tuple[ast.expr, Module]]:
        """What an attribute of this name is set to anywhere: `self._ids = ...`."""
        return [
            (value, module)
            for module in self.modules
            for statement in ast.walk(module.tree)
            for target, value in _settings(statement)
            if isinstance(target, ast.Attribute) and target.attr == name
        ]

    def _returned(self, name: str) -> list[tuple[ast.expr, Module]]:
        """What functions and properties of this name return."""
        return [
            (back.value, place)
            for place in self.modules
            for function in ast.walk(place.tree)
            if isinstance(function, Function) and function.name == name
            for back in ast.walk(function)
            if isinstance(back, ast.Return) and back.value is not None
        ]


def _fixed(part: ast.expr) -> str:
    return part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else OPEN


def _loggers(tree: ast.Module) -> dict[str, str]:
    """The loggers that a module names: `logger = logging.getLogger("scopegate.gate")`."""
    return {
        target.id: name
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and (name := _got(node.value)) is not None
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def _got(node: ast.expr) -> str | None:
    match node:
        case ast.Call(func=ast.Attribute(attr="getLogger"), args=[ast.Constant(value=str(name))]):
            return name
    return None


def _logger(node: ast.expr, loggers: dict[str, str]) -> str | None:
    return loggers.get(node.id) if isinstance(node, ast.Name) else _got(node)


def _levels(call: ast.Call, module: Module) -> tuple[list[tuple[str, dict[str, bool]]], ast.expr]:
    """The levels of a call, each with the condition under which it is that one; and its message."""
    assert isinstance(call.func, ast.Attribute)
    if call.func.attr != "log":
        return [(call.func.attr, {})], call.args[0]
    match call.args:
        case [ast.Attribute(attr=level), message]:
            return [(level.lower(), {})], message
        case [
            ast.IfExp(test=test, body=ast.Attribute(attr=level), orelse=ast.Attribute(attr=other)),
            message,
        ]:
            condition = ast.dump(test)
            return [(level.lower(), {condition: True}), (other.lower(), {condition: False})], message
    raise _unreadable(call, module, "level")


def _assigned(name: str, node: ast.AST, module: Module) -> Iterator[ast.expr]:
    """What a name is set to in the nearest function around a node that sets it, or in the module."""
    for around in module.around(node):
        values = [
            value
            for statement in _inside(around)
            for target, value in _settings(statement)
            if isinstance(target, ast.Name) and target.id == name
        ]
        if values:
            yield from values
            return
        if isinstance(around, Function):
            arguments = (*around.args.posonlyargs, *around.args.args, *around.args.kwonlyargs)
            if name in {argument.arg for argument in arguments}:
                return


def _inside(around: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function or module, but for those of functions inside it."""
    for node in ast.iter_child_nodes(around):
        yield node
        if not isinstance(node, Function):
            yield from _inside(node)


def _settings(statement: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    match statement:
        case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
            yield from zip(targets, values, strict=True)
        case ast.Assign(targets=targets, value=value):
            yield from ((target, value) for target in targets)
        case ast.AnnAssign(target=target, value=ast.expr() as value):
            yield target, value
        case ast.AugAssign(target=target, op=ast.BitOr(), value=value):
            yield target, value


def _put_in(name: str, node: ast.AST, module: Module) -> Iterator[str]:
    """Keys that are put into a dict later: `fields["cause"] = ...`."""
    for statement in _inside(next(module.around(node))):
        for target, _ in _settings(statement):
            match target:
                case ast.Subscript(value=ast.Name(id=of), slice=ast.Constant(value=key)) if of == name:
                    yield str(key)


def _named(node: ast.expr) -> str | None:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return None


def _unreadable(node: ast.expr, module: Module, what: str) -> Unreadable:
    return Unreadable(
        f"{module.path}:{node.lineno}: the {what} of this log line cannot be read from the code: "
        f"{ast.unparse(node)}; write it out, or teach tests/logged.py to read it"
    )
