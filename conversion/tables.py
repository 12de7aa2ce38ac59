"""Tables of names: how the tensors of one family become those of another, and back.

A table maps patterns of source names, in which `{}` stands for a layer's number, to

    "model.norm.weight"     the pattern of the target's name: the tensor as it is
    transposed(pattern)     the same, for a matrix that is stored the other way round
    split(patterns, ...)    several tensors, stored as one
    None                    left out on purpose; a comment beside it says why
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch

from .checkpoint import named


NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Rule(NamedTuple):
    """What becomes of one source tensor: `there` makes the tensors named `targets` of it, `back` makes it of them."""

    targets: tuple[str, ...]
    there: Callable
    back: Callable


Table = Mapping[str, str | Rule | None]


def transposed(target: str) -> Rule:
    """Rule for a matrix stored as `[in, out]`, as GPT-2's are."""
    return Rule((target,), lambda x: [x.T.contiguous()], lambda parts: parts[0].T.contiguous())


def split(*targets: str, transpose: bool = False) -> Rule:
    """Rule for tensors of equal size stored one after the other, along the outputs."""

    def there(x: torch.Tensor) -> list[torch.Tensor]:
        return [part.contiguous() for part in (x.T if transpose else x).chunk(len(targets))]

    def back(parts: list[torch.Tensor]) -> torch.Tensor:
        x = torch.cat(parts)
        return x.T.contiguous() if transpose else x

    return Rule(targets, there, back)


def rule_of(entry: str | Rule) -> Rule:
    return entry if isinstance(entry, Rule) else Rule((entry,), lambda x: [x], lambda parts: parts[0])


def numbered(name: str) -> tuple[str, list[str]]:
    """Return a name's pattern and its first number: layers.3.mlp.0.bias is layers.{}.mlp.0.bias, 3."""
    escaped = name.replace("{", "{{").replace("}", "}}")
    return NUMBER.sub("{}", escaped, count=1), NUMBER.findall(name)[:1]


def unique(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return new names with the old name of each.

    Raises:
        ValueError: If two old names become one new one.
    """
    found = {}
    for new, old in pairs:
        if new in found:
            raise ValueError(f"source tensors must become different ones, got {found[new]} and {old}, both {new}")
        found[new] = old
    return found


def origins(table: Table, names: Mapping[str, str]) -> dict[str, str]:
    """Return what each target tensor is made of.

    Args:
        table: Rules for all of them.
        names: Names of the table with the name of each in the source.

    Raises:
        ValueError: If a tensor has no rule, or two become one; the message has the names in the source.
    """
    unknown = [old for name, old in names.items() if numbered(name)[0] not in table]
    if unknown:
        raise ValueError(f"every source tensor needs a rule, got {len(unknown)} without: {named(unknown)}")
    pairs = []
    for name, old in names.items():
        pattern, numbers = numbered(name)
        targets = rule_of(table[pattern]).targets if table[pattern] is not None else ()
        pairs += [(target.format(*numbers), old) for target in targets]
    return unique(pairs)


def apply_table(table: Table, source: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the target's tensors that the source's make, each of which has a rule."""
    made = {}
    for name, tensor in source.items():
        pattern, numbers = numbered(name)
        if table[pattern] is not None:
            rule = rule_of(table[pattern])
            for target, part in zip(rule.targets, rule.there(tensor), strict=True):
                made[target.format(*numbers)] = part
    return made


def sources_of(table: Table, targets: list[str]) -> dict[str, str]:
    """Return the name of the source tensor of each target tensor that has one."""
    patterns = {target: source for source, entry in table.items() if entry for target in rule_of(entry).targets}
    found = {}
    for name in targets:
        pattern, numbers = numbered(name)
        if pattern in patterns:
            found[name] = patterns[pattern].format(*numbers)
    return found


def apply_back(table: Table, made: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the source's tensors that `made` came from, all of which the table must name.

    Raises:
        ValueError: If a tensor has no way back, or one of several that belong together is missing.
    """
    origins = sources_of(table, list(made))
    if lost := set(made) - set(origins):
        raise ValueError(f"every tensor needs a way back, got {len(lost)} without: {named(lost)}")
    source = {}
    for name in dict.fromkeys(origins.values()):
        pattern, numbers = numbered(name)
        rule = rule_of(table[pattern])
        parts = [target.format(*numbers) for target in rule.targets]
        if lost := set(parts) - set(made):
            raise ValueError(f"{name} needs all of {', '.join(parts)}, got none of {named(lost)}")
        source[name] = rule.back([made[part] for part in parts])
    return source
