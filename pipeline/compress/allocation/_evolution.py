"""An evolutionary search over levels: shares move between parts of a type, so that the total stays what it is.

Successive halving measures all offspring on little data and few of them on much; the parents come in again at the end,
so the best that was found is never lost. What was measured once is known. The same generator gives the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

Choice = tuple[int, ...]
"""A level for every part."""


def evolve(
    start: Choice,
    heights: Sequence[int],
    types: Sequence[Sequence[int]],
    measure: Callable[[Sequence[Choice], int], Sequence[float]],
    halving: Sequence[tuple[int, int]],
    offspring: int,
    generations: int,
    swaps: int,
    rng: np.random.Generator,
) -> Choice:
    """The choice of the least cost that was found.

    `heights`: levels of every part; `types`: parts among which a level up here is one down there. `measure(choices,
    effort)` gives their costs; `halving`: of every stage its effort, and how many go on (of the last: to be parents).
    """
    known: dict[tuple[Choice, int], float] = {}

    def best(pool: Sequence[Choice], effort: int, stay: int) -> list[Choice]:
        new = [choice for choice in pool if (choice, effort) not in known]
        known.update(zip([(choice, effort) for choice in new], measure(new, effort) if new else (), strict=True))
        return sorted(pool, key=lambda choice: known[choice, effort])[:stay]

    parents = [start]
    for _ in range(generations):
        born = (mutated(parents[int(rng.integers(len(parents)))], heights, types, swaps, rng) for _ in range(offspring))
        pool = list(dict.fromkeys(born))
        for effort, stay in halving[:-1]:
            pool = best(pool, effort, stay)
        parents = best(list(dict.fromkeys([*parents, *pool])), *halving[-1])
    return parents[0]


def mutated(
    parent: Choice, heights: Sequence[int], types: Sequence[Sequence[int]], swaps: int, rng: np.random.Generator
) -> Choice:
    """A choice one to `swaps` swaps away: each takes one part of a type a level up and another a level down."""
    found = list(parent)
    for _ in range(rng.integers(1, swaps + 1)):
        own = types[int(rng.integers(len(types)))]
        up = [i for i in own if found[i] + 1 < heights[i]]
        if not up:
            continue
        more = up[int(rng.integers(len(up)))]
        down = [i for i in own if found[i] and i != more]
        if not down:
            continue
        found[more] += 1
        found[down[int(rng.integers(len(down)))]] -= 1
    return tuple(found)
