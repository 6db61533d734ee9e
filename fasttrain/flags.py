"""How the command line shows the values of its flags."""

from __future__ import annotations

import tyro


def visible_defaults() -> tyro.constructors.ConstructorRegistry:
    """How strings are shown in --help: a default of a newline as \\n, not as an empty line."""
    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def text(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[str] | None:
        if info.type is not str:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1, metavar="STR", instance_from_str=lambda words: words[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: ["".join(c if c.isprintable() else repr(c)[1:-1] for c in value)],
        )  # fmt: skip

    return registry
