"""What a configuration file may hold: refused is what the parser would crash on, or would leave out without a word."""

from collections.abc import Mapping
from typing import Any

import yaml

from ecn_dist.errors import UserError


def check_yaml(text: str, defaults: Mapping[str, Any]) -> None:
    """Raise `UserError`, or YAML's own error. `defaults` are the options' own values, some of them sections of such."""
    _check_form(text)
    _check_section("", yaml.compose(text, yaml.SafeLoader), defaults)


def read_yaml(text: str) -> Any:
    """What a text from anybody holds, of whatever keys. Raises `UserError`, or YAML's own error."""
    _check_form(text)
    return yaml.safe_load(text)


def flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options by their dotted keys, as {"memory.momentum": 0.01, ...}, from sections within each other."""
    found: dict[str, Any] = {}
    for key, value in sections.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _check_form(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UserError("has a YAML alias (*NAME), of which a few lines make gigabytes; write the value itself")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > 3:
            raise UserError(f"is nested too deep{event.start_mark}; options stand in sections, and these in the file")


def _check_section(name: str, node: yaml.Node | None, defaults: Mapping[str, Any]) -> None:
    if not isinstance(node, yaml.MappingNode):
        held = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value) if node and node.value else "empty"
        raise UserError(f"{name or 'the file'} is {held}, where options by name are needed; give one, or leave it out")
    keys = [str(key.value) for key, _ in node.value]  # one that is a list or a mapping, the parser refuses
    for key, (_, value) in zip(keys, node.value, strict=True):
        full, kind, default = f"{name and name + '.'}{key}", value.tag.rpartition(":")[2], defaults.get(key)
        if keys.count(key) > 1:
            raise UserError(f"{full} stands twice; keep one of them")
        if isinstance(default, dict):
            _check_section(full, value, default)
        elif kind in ("binary", "set", "omap", "pairs"):  # the parser would take them for lists
            raise UserError(f"{full} is of YAML's type !!{kind}; write a number, a text or a list")
        elif kind == "null" and default is not None:
            raise UserError(f"{full} is empty; give it a value, or leave it out for its default")
