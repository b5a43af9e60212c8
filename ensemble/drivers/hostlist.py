"""The host lists that schedulers write: `nid[001-003,010],login1`, and their lists of counts, `64(x2),32`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

from ensemble.errors import AllocationError

#: More hosts than any machine has nodes: a longer list is a mistake, not an allocation.
MAX_HOSTS = 100_000
#: A host name's limit (RFC 1035, in characters).
MAX_NAME = 253

# Up to commas outside of brackets.
_ELEMENT = re.compile(r"(?:[^\[\],]|\[[^\[\]]*\])+")
_RANGE = re.compile(r"([0-9]{1,18})(?:-([0-9]{1,18}))?")
_NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_.-]*")
_COUNT = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,6})\))?")


def expand(text: str) -> list[str]:
    """Return the hosts that a Slurm, Flux or PALS host list stands for, in its order, repetitions kept.

    Numbers are as wide as the low end of their range is written. The order is that of
    `scontrol show hostnames` (Slurm 22.05): the last bracket varies fastest, then the first one, then
    the second one, and so on. A suffix after the last bracket, which Slurm refuses, is accepted.

    Raises:
        AllocationError: It is malformed or stands for more than 100,000 hosts.
    """
    hosts: list[str] = []
    for element in _split(text.strip(), text):
        hosts.extend(_expand_element(element, text, room=MAX_HOSTS - len(hosts)))
    return hosts


def counts(text: str) -> list[int]:
    """Return one number for each node of a list such as `64(x2),32` (SLURM_JOB_CPUS_PER_NODE).

    Raises:
        AllocationError: It is malformed or has more than 100,000 numbers.
    """
    numbers: list[int] = []
    for item in text.strip().split(","):
        match = _COUNT.fullmatch(item)
        if match is None:
            raise AllocationError(f"list of counts {_shown(text)}: {item[:40]!r} is not N or N(xM)")
        times = int(match[2] or 1)
        if len(numbers) + times > MAX_HOSTS:
            raise AllocationError(f"list of counts {_shown(text)}: more than {MAX_HOSTS:,} numbers")
        numbers.extend([int(match[1])] * times)
    return numbers


def _split(text: str, whole: str) -> Iterator[str]:
    """Yield the elements between the commas that are outside of brackets."""
    position = 0
    while True:
        match = _ELEMENT.match(text, position)
        if match is None:
            raise _malformed(whole, "a name is empty, or a bracket is not closed or not opened")
        yield match[0]
        position = match.end()
        if position == len(text):
            return
        if text[position] != ",":
            raise _malformed(
                whole, f"the bracket at {text[position : position + 20]!r} has no pair"
            )
        position += 1


def _expand_element(element: str, whole: str, *, room: int) -> Iterator[str]:
    # Literal parts at even places, what is in brackets at odd ones.
    parts = re.split(r"[\[\]]", element)
    ranges = [_ranges(part, whole) for part in parts[1::2]]
    if math.prod(sum(high - low + 1 for low, high, _ in each) for each in ranges) > room:
        raise _malformed(whole, f"more than {MAX_HOSTS:,} hosts")
    # In the order of the loops, outermost first.
    order = [*range(len(ranges) - 2, -1, -1), len(ranges) - 1] if ranges else []
    numbers = [
        [f"{n:0{w}}" for low, high, w in each for n in range(low, high + 1)] for each in ranges
    ]
    for chosen in itertools.product(*(numbers[place] for place in order)):
        for place, number in zip(order, chosen, strict=True):
            parts[2 * place + 1] = number
        name = "".join(parts)
        if len(name) > MAX_NAME or not _NAME.fullmatch(name):
            raise _malformed(whole, f"{name[:40]!r} is not a host name")
        yield name


def _ranges(text: str, whole: str) -> list[tuple[int, int, int]]:
    """Return low end, high end and width of each range of one bracket."""
    found = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item)
        if match is None:
            raise _malformed(whole, f"{item[:40]!r} is not a number or a range of numbers")
        low, high = int(match[1]), int(match[2] or match[1])
        if high < low:
            raise _malformed(whole, f"the range {item} runs backwards")
        found.append((low, high, len(match[1])))
    return found


def _malformed(whole: str, why: str) -> AllocationError:
    return AllocationError(f"host list {_shown(whole)}: {why}")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
