"""Which learning rate and optimizer the demo's base model should use, at the demo's own scale.

    python benchmarks/demo_rate.py [--tokens '400K tokens'] [--preset 1m] muon:1e-2 adamw:1e-2 ...

Each candidate trains the base recipe on the old corpus of a finished demo (--demo, default demo/) and prints its
validation loss. One seed: meant to find the order of magnitude, not to rank optimizers.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", metavar="OPTIMIZER:PEAK")
    parser.add_argument("--tokens", default="400K tokens")
    parser.add_argument("--preset", default="1m")
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--sequences", type=int, default=16)
    arguments = parser.parse_args()
    from perennial.train.recipe import parse_recipe
    from perennial.train.run import start

    print("| optimizer | peak | rows per update | old nats/token | new nats/token |")
    print("|---|---|---|---|---|")
    for candidate in arguments.candidates:
        optimizer, _, peak = candidate.partition(":")
        recipe = {
            "name": "rate",
            "model": {"preset": arguments.preset},
            "corpora": {"old": str((arguments.demo / "corpora/old").resolve())},
            "stages": [
                {
                    "name": "pretrain",
                    "budget": arguments.tokens,
                    "mixture": {"old": "100%"},
                    "schedule": {"name": "cosine", "peak": float(peak), "final": "10%", "warmup": "5%"},
                    "optimizer": optimizer,
                }
            ],
            "batch": {"sequences": arguments.sequences, "sequence_length": 128},
            "evaluation": {"every": None, "corpora": {"new": str((arguments.demo / "corpora/new").resolve())}},
            "checkpoints": {"every": None},
        }
        with tempfile.TemporaryDirectory() as folder:
            result = start(parse_recipe(recipe), Path(folder) / "run", base=Path(), quiet=True)
        losses = result["evaluation"]["after"]
        shown = [f"{losses[name]['nats_per_token']:.3f}" for name in ("old", "new")]
        print(f"| {optimizer} | {peak} | {arguments.sequences} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
