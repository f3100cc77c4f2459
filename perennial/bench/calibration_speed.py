"""Times and weighs updates of one model, alone in its process: reads JSON from standard input, prints JSON.

A process of its own because the peak of a process's memory never falls again.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from perennial.core.environment import memory_bytes, prepare_threads
from perennial.model.config import ModelConfig
from perennial.model.foreign import AnyConfig, flops_per_token, num_parameters, parse_config
from perennial.plan.memory import MemoryPlan, Run, Stage, plan_memory, precision_of_machine
from perennial.plan.small_copies import shrunk

ROOM = 0.5
"""Share of the free memory that a timed model may need; larger ones are timed as a smaller copy."""
OVERHEAD = 0.95
"""What `tokens_per_second` takes off for evaluation and saving, which plans count for themselves."""


def measured(asked: dict[str, Any]) -> dict[str, float]:
    """Tokens per second and memory of updates with these settings, and the memory that was planned."""
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import tokens_per_second

    config = parse_config(asked["model"])
    length = asked["sequence_length"]
    there = memory_bytes()["available"]
    while (planned := _planned(config, asked)).total > ROOM * (there or float("inf")) and isinstance(
        config, ModelConfig
    ):
        config = shrunk(config, 0.25 * flops_per_token(config, length), length=length)
    batch = {"sequences": asked["sequences"], "sequence_length": length, "micro_batch": asked["micro_batch"]}
    stage = {
        "name": "timed",
        "budget": "1 tokens",
        "mixture": {"text": 1},
        "schedule": {"name": "constant", "peak": 1e-3},
        "optimizer": asked["optimizer"],
    }
    recipe = parse_recipe(
        {"name": "timed", "model": {"preset": "1m"}, "corpora": {"text": "."}, "stages": [stage], "batch": batch}
    )
    speed = tokens_per_second(config, recipe, seconds=4.0) / OVERHEAD
    return {
        "tokens_per_second": speed,
        "flops_per_token": float(flops_per_token(config, length)),
        "parameters": num_parameters(config),
        "memory_bytes": _peak_bytes(),
        "planned_memory_bytes": planned.total,
    }


def _planned(config: AnyConfig, asked: dict[str, Any]) -> MemoryPlan:
    from perennial.core import plugins

    optimizer = plugins.build("optimizers", asked["optimizer"])[0]
    return plan_memory(
        Run(
            config=config,
            stages=(Stage("timed", optimizer, None, None),),
            sequences=asked["sequences"],
            sequence_length=asked["sequence_length"],
            micro_batch=asked["micro_batch"],
            precision=precision_of_machine("cpu"),
            device="cpu",
        )
    )


def _peak_bytes() -> int:
    """The most memory that this process ever held."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    prepare_threads()
    print(json.dumps(measured(json.load(sys.stdin))))
