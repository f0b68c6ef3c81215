"""Recipes on disk: strict YAML in, one YAML file out.

`yaml.safe_load` alone lets mistakes through: a repeated key keeps its last value, an unknown key is carried along, and
by YAML 1.1 `1e-4` is a text, `017` is 15 and `1:30` is 90. All are refused or mended here, with file, key, value and
the way out; numbers are those of YAML 1.2.
"""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from ecdit_ds.config.recipe import Recipe
from ecdit_ds.errors import ConfigError, shown

RECIPE_FOLDER = Path(__file__).parents[1] / "configs"
DEFAULT_RECIPE = "demo"
_MOST_BASES = 8
"""Files that may stand upon each other; a recipe of more is hard to read, and a mistake is likelier."""
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_NUMBERS = {
    _INT: re.compile(r"[-+]?\d[\d_]*|0o[0-7]+|0x[\da-fA-F]+"),
    _FLOAT: re.compile(r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
}
_MOST_DIGITS = 40
_MOST_DEPTH = 32


class _StrictLoader(yaml.CSafeLoader):
    """SafeLoader that refuses repeated keys and reads numbers as YAML 1.2 does."""

    yaml_implicit_resolvers = {  # noqa: RUF012 -- as PyYAML declares it
        first: [(tag, pattern) for tag, pattern in rules if tag not in _NUMBERS]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = self.construct_object(key_node, deep=True), key_node.start_mark.line + 1
            if not (isinstance(key, str) and key.isidentifier()):
                raise ConfigError(f"line {line}: key {shown(key)} is not a name")
            if key in seen:
                raise ConfigError(f"line {line}: {key} is given twice (first in line {seen[key]}); keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        if len(text) > _MOST_DIGITS:
            raise ConfigError(f"line {node.start_mark.line + 1}: {shown(text)} is a number of {len(text)} digits")
        return int(text, 0 if text[1:2] in ("x", "o") else 10)


class _StrictDumper(yaml.CSafeDumper):
    """SafeDumper that quotes texts such as `1e-4` and `0o17`, which our loader would read as numbers."""


for _yaml_class in (_StrictLoader, _StrictDumper):
    for _tag, _pattern in _NUMBERS.items():
        _yaml_class.add_implicit_resolver(_tag, re.compile(f"^({_pattern.pattern})$"), list("-+.0123456789"))
_StrictLoader.add_constructor(_INT, _StrictLoader.construct_int)


def recipe_names() -> list[str]:
    """Return the names that `--config` knows."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def find_recipe(name_or_path: str) -> Path:
    """Return the file of a recipe given by name (`demo`) or by path (`my/recipe.yaml`)."""
    if name_or_path in recipe_names():
        return RECIPE_FOLDER / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    near = difflib.get_close_matches(name_or_path, recipe_names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"--config {name_or_path}: neither a file nor a recipe; {hint}recipes are {', '.join(recipe_names())}"
    )


def load_recipe(name_or_path: str = DEFAULT_RECIPE, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides.

    Args:
        name_or_path: a name in `configs/` or a YAML file. `base: NAME` in it, or `base: FILE` from its folder, takes
            over what it leaves out from there.
        overrides: such as `train.max_steps=20`; values are YAML.

    Raises:
        ConfigError: naming the file, the key, the value and the nearest valid name or the divisors that work.
    """
    path = find_recipe(name_or_path)
    data = _read(path, ())
    data.setdefault("name", path.stem)
    for override in overrides:
        _apply_override(data, override)
    try:
        return recipe_from_dict(data)
    except ConfigError as error:
        raise ConfigError(f"{path}{' with --set' if overrides else ''}: {error}") from None


def _read(path: Path, readers: tuple[Path, ...]) -> dict[str, Any]:
    """Return what a file says, over what its `base` says; `readers` are the files that this one is the base of."""
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ConfigError(f"holds {type(data).__name__}, not a recipe")
        base = data.pop("base", None)
        if base is None:
            return data
        below = _base_of(path, base)
        if below in (path.resolve(), *readers):
            raise ConfigError(f"base: {base} leads back to this file")
        if len(readers) + 1 >= _MOST_BASES:
            raise ConfigError(f"base: {base} is the {len(readers) + 1}th below another; write some of them as one file")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    inherited = _read(below, (path.resolve(), *readers))
    inherited.pop("name", None)
    return _merged(inherited, data)


def _base_of(path: Path, base: object) -> Path:
    """Return the file that `base` names in the recipe `path`: a recipe's name, or a file from that recipe's folder."""
    if base in recipe_names():
        return (RECIPE_FOLDER / f"{base}.yaml").resolve()
    if isinstance(base, str) and (path.parent / base).is_file():
        return (path.parent / base).resolve()
    raise ConfigError(
        f"base: {shown(base)} is neither a file in {path.parent} nor a recipe's name ({', '.join(recipe_names())})"
    )


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return both, section by section; where both give a value, the one above."""
    both = {key for key in below.keys() & above.keys() if isinstance(below[key], dict) and isinstance(above[key], dict)}
    return below | above | {key: _merged(below[key], above[key]) for key in both}


def parse_yaml(text: str) -> Any:
    """Parse YAML by the rules above; syntax errors become one-line ConfigErrors."""
    try:
        _refuse_depth(text)
        return _StrictLoader(text).get_single_data()
    # Tagged or odd scalars (`2026-13-45`, `!!int x`) escape PyYAML as plain Python errors; depth as RecursionError.
    except (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None


def _refuse_depth(text: str) -> None:
    """Refuse sections within sections within ..., for each of which libyaml takes a stack, until the process ends.

    And sections that stand for others, which take no room in a file and, merged with a base's, all there is in memory.
    """
    depth, sections = 0, set[str]()
    for event in yaml.parse(text, yaml.CSafeLoader):
        if isinstance(event, yaml.MappingStartEvent) and event.anchor:
            sections.add(event.anchor)
        if isinstance(event, yaml.AliasEvent) and event.anchor in sections:
            raise yaml.YAMLError(f"*{event.anchor} repeats a section; write it out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MOST_DEPTH:
            raise yaml.YAMLError(f"more than {_MOST_DEPTH} sections within each other")


def recipe_from_dict(data: dict[str, Any]) -> Recipe:
    """Build a recipe from plain dicts, refusing unknown keys and wrong types."""
    return typing.cast(Recipe, _build(Recipe, data, ""))


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_recipe` reads back to an equal one."""
    return yaml.dump(recipe.to_dict(), Dumper=_StrictDumper, sort_keys=False, allow_unicode=True, width=120)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write key=value, such as train.max_steps=20")
    try:
        value = parse_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"--set {override}: {error}") from None
    *sections, leaf = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    data[leaf] = value


def _build(cls: type, data: Any, prefix: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: {shown(data)} is not a section of key: value lines")
    hints, fields = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"keys here are {', '.join(fields)}"
            raise ConfigError(
                f"{prefix}{shown(key)[1:-1]}: {shown(data[key])} is set, but there is no such key; {hint}"
            )
    for name, spec in fields.items():
        has_default = spec.default is not dataclasses.MISSING or spec.default_factory is not dataclasses.MISSING
        if name not in data and not has_default:
            raise ConfigError(f"{prefix}{name}: is missing and has no default")
    return cls(**{key: _convert(value, hints[key], f"{prefix}{key}") for key, value in data.items()})


def _convert(value: Any, hint: Any, key: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{key}.")
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(hint):
            try:
                return _convert(value, option, key)
            except ConfigError:
                continue
        raise ConfigError(f"{key}: {shown(value)} is none of {_describe(hint)}")
    if origin is Literal:
        options = typing.get_args(hint)
        if value in options:
            return value
        near = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
        hint_text = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"{key}: {shown(value)} is not known; {hint_text}choose from {', '.join(options)}")
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key}: {shown(value)} is not a list")
        return tuple(_convert(item, typing.get_args(hint)[0], f"{key}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{key}: {shown(value)} is a {type(value).__name__}, not a {_describe(hint)}")
    return value


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, typing.get_args(hint)))
    return {float: "number (float)", int: "whole number (int)", str: "text (str)"}.get(hint, str(hint))
