"""The table itself and the decorator that fills it."""

from collections.abc import Callable

Rule = Callable[..., str]
TABLE: dict[str, Rule] = {}


def op(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the meaning of PyTorch operators, named as `namespace.operator.overload`."""

    def register(rule: Rule) -> Rule:
        for name in names:
            if name in TABLE:
                raise ValueError(f"{name} is mapped twice")
            TABLE[name] = rule
        return rule

    return register


def unary(name: str, expression: str) -> None:
    """Map a one-tensor operator to a MindSpore function."""
    op(name)(lambda e, node, x, **kwargs: f"{expression}({e(x)})")
