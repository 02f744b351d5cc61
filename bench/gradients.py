"""Gradients of single rows: many at a time beside a loop of one row at a time, and what a projection costs.

usage: python bench/gradients.py [--rows N] [--tokens T] [--hidden H] [--layers L] [--rounds R]

The loop runs a forward and a backward pass a row with the gradients of all weights, as autograd gives them, and hands
out those of the linear layers. Everything else does so for all rows of a batch: the gradients themselves, their norms,
their products with a fixed direction, projections of them; then the head alone, and low-rank adapters as LESS has them.
All run in turns on one thread, timed in CPU seconds; a ratio is the median over the rounds of loop / other. `error` is
the largest relative difference to the loop's own gradients, over rows; `control` is that of gradients given to the
wrong rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.models.gradients import along, backward, head, linear_layers, outer, squared_norms, token_losses
from pipeline.models.projection import projection
from pipeline.models.training import Shape, new_lm
from pipeline.scores.less import adapt

SKETCH = 1024


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    n, tokens = options.rows, options.tokens
    shape = Shape(hidden=options.hidden, layers=options.layers, mlp=3 * options.hidden, vocab=512, context=tokens)
    model = new_lm(shape, 0).eval()
    own = model.get_output_embeddings()
    own.weight = torch.nn.Parameter(own.weight.detach().clone())  # not the embedding's, whose gradient would be added
    layers, last = linear_layers(model), head(model)
    torch.manual_seed(0)
    ids = torch.randint(0, 512, (n, tokens))
    weight = torch.full((n, tokens - 1), 1 / (tokens - 1))
    directions = {name: torch.randn(layer.weight.shape) for name, layer in layers.items()}

    def loop(of: dict[str, Any]) -> list[list[torch.Tensor]]:
        model.requires_grad_(True)
        rows = []
        for i in range(n):
            model.zero_grad()  # lets go of the gradients; they are not overwritten
            (token_losses(model, ids[i : i + 1]) * weight[i]).sum().backward()
            rows.append([layer.weight.grad for layer in of.values()])
        model.requires_grad_(False)
        return rows

    def taken(of: dict[str, Any], make: Callable[..., torch.Tensor]) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        backward(model, of, ids, weight, lambda name, a, b: found.__setitem__(name, make(name, a, b)))
        return found

    def gradients(of: dict[str, Any]) -> dict[str, torch.Tensor]:
        return taken(of, lambda name, a, b: outer(a, b))

    def joined(of: dict[str, Any]) -> torch.Tensor:
        found = gradients(of)
        return torch.cat([found[name] for name in of], dim=1)

    def sketches(kind: Any) -> torch.Tensor:
        sums, project = torch.zeros(n, SKETCH), projections[kind]
        taken(layers, lambda name, a, b: project.add(name, outer(a, b), sums))
        return sums

    projections = {kind: projection(kind, SKETCH, 0) for kind in ("countsketch", "rademacher")}
    exact, exact_head = (
        torch.stack([torch.cat([g.flatten() for g in row]) for row in loop(of)]) for of in (layers, last)
    )

    def error(found: torch.Tensor, of: torch.Tensor) -> float:
        return float(((found - of).norm(dim=1) / of.norm(dim=1)).max())

    norms = sum(taken(layers, lambda name, a, b: squared_norms(a, b)).values())
    products = sum(taken(layers, lambda name, a, b: along(a, b, directions[name])).values())
    expected = exact @ torch.cat([direction.flatten() for direction in directions.values()])
    errors = {
        "gradients": error(joined(layers), exact),
        "norms": float((norms / exact.square().sum(dim=1) - 1).abs().max()),
        "products": float(((products - expected).abs() / expected.abs().mean()).max()),
        "head": error(joined(last), exact_head),
        "control": error(joined(layers).roll(1, 0), exact),
    }
    works: dict[str, Callable[[], object]] = {
        "loop": lambda: loop(layers),
        "gradients": lambda: gradients(layers),
        "norms": lambda: taken(layers, lambda name, a, b: squared_norms(a, b)),
        "products": lambda: taken(layers, lambda name, a, b: along(a, b, directions[name])),
        "countsketch": lambda: sketches("countsketch"),
        "rademacher": lambda: sketches("rademacher"),
        "head": lambda: gradients(last),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for round_ in range(options.rounds + 1):
        for name, work in works.items():
            took = seconds(work)
            if round_:  # the first warms up
                times[name].append(took)
    # Adapters change the model, so they come last; the loop beside them is the one with the gradients of all weights.
    adapters = adapt(model, 8, 16, 0.0, 0).requires_grad_(False)
    low = linear_layers(adapters)
    pairs = [(seconds(lambda: loop(layers)), seconds(lambda: gradients(low))) for _ in range(options.rounds)]
    ratios = {
        name: statistics.median(a / b for a, b in zip(times["loop"], took, strict=True)) for name, took in times.items()
    }
    ratios["adapters"] = statistics.median(a / b for a, b in pairs)
    report = {
        "parameters": exact.shape[1],
        "rows": n,
        "tokens": tokens,
        "rows_per_second_of_the_loop": round(n / statistics.median(times["loop"]), 1),
        "times_as_fast": {name: round(ratio, 2) for name, ratio in ratios.items() if name != "loop"},
        "error": {name: float(f"{value:.1e}") for name, value in errors.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
