"""What does the exact arithmetic cost, beside a float momentum update?

    python benchmarks/arithmetic.py [--elements 4194304] [--rounds 15] [--readme]

Time of one step forward and its reverse together, float32, against two float momentum updates
`v.mul_(g).add_(f, alpha=1-g); x.add_(v)`, interleaved in one process; medians, as ratios. "fused" is what MNET_FX_FUSED=1 gives;
"proof" the fingerprints of the state, taken once each way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from tables import save
from tqdm import trange

from mnet_fx.fixed_point import State
from mnet_fx.fused import FUSED
from mnet_fx.loops import EAGER, Kernels

COLUMNS = {"name": "loop", "milliseconds": "ms", "ratio": "ratio to float"}


def runs(elements: int) -> dict[str, Callable[[], object]]:
    x, v, f = (torch.randn(elements) for _ in range(3))

    def updates() -> None:
        for _ in range(2):
            v.mul_(0.9).add_(f, alpha=0.1)
            x.add_(v)

    def there_and_back(kernels: Kernels) -> Callable[[], object]:
        state = State(torch.randn(elements), kernels=kernels)

        def run() -> None:
            record, _ = state.step(f, 0.9, 0.1)
            state.unstep_x(record)
            state.unstep_u(record, f)

        return run

    state = State(torch.randn(elements))
    return {
        "two float updates": updates,
        "eager": there_and_back(EAGER),
        "fused": there_and_back(FUSED),
        "proof": lambda: [state.fingerprint().item() for _ in range(2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--readme", action="store_true", help="put the table into README.md")
    options = parser.parse_args()
    torch.set_num_threads(2)
    loops = runs(options.elements)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in trange(options.rounds + 1):
        for name, run in loops.items():
            begin = time.perf_counter()
            run()
            if round_:  # the first compiles and warms up
                times[name].append(time.perf_counter() - begin)
    base = median(times["two float updates"])
    rows = [{"name": n, "milliseconds": median(t) * 1e3, "ratio": median(t) / base} for n, t in times.items()]
    save("arithmetic", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
