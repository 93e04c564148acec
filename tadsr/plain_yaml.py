"""YAML that says what it seems to: no key twice, and numbers as people write them."""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

_MAX_ALIASES = 30
"""Ten lines of ten each would stand for ten thousand million values."""


class _PlainLoader(yaml.SafeLoader):
    """1e-4 is a number and 0100 a hundred; 1:30 and dates are texts."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping; of two values under one name YAML would keep the last."""
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise yaml.YAMLError(
                        f"{key.value} must stand once, but is in lines {lines[key.value]} and "
                        f"{line}"
                    )
                lines[key.value] = line
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Read a decimal number."""
        return int(node.value)


for _kind, _pattern, _first in (
    ("bool", "yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF",
     "yYnNtTfFoO"),
    ("int", r"[-+]?\d[\d_]*", "-+0123456789"),
    ("float", r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?\.?(inf|Inf|INF)|\.?(nan|NaN|NAN)",
     "-+0123456789.iInN"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
):  # fmt: skip
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$", re.ASCII), list(_first)
    )
_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """Parse YAML of plain values; raises yaml.YAMLError, a ValueError or RecursionError."""
    if sum(isinstance(each, yaml.AliasEvent) for each in yaml.parse(text)) > _MAX_ALIASES:
        raise ValueError(f"it has more than {_MAX_ALIASES} aliases")
    return yaml.load(text, _PlainLoader)
