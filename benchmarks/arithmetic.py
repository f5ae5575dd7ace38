"""What does the exact arithmetic cost, beside a float momentum update?

    python benchmarks/arithmetic.py [--elements 4194304] [--rounds 25] [--threads 1] [--readme]

Time of one step forward and its reverse together, float32, against two float momentum updates
`v.mul_(g).add_(f, alpha=1-g); x.add_(v)`, interleaved in one process; medians of processor time, and of ratios taken within a round.
"eager" is what MNET_FX_FUSED=0 gives; "fused" are the loops in C; "proof" the fingerprints of the state, taken once each way. With one
thread, other work on the machine disturbs the ratios least. With several, set OMP_WAIT_POLICY=passive, or the time that threads spend
waiting for the next loop is counted.

A step returns a fresh tensor, a float update does not. By chance of its layout, glibc's heap either gives the same 16 MiB out again and
again, or returns them to the system each time, and then their page faults take longer than the loops. The script asks it to keep them.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from statistics import median

import torch
from tables import save
from tqdm import trange

from mnet_fx.arithmetic.fixed_point import State
from mnet_fx.arithmetic.kernels.choice import FUSED
from mnet_fx.arithmetic.kernels.eager import EAGER, Kernels

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
        "proof": lambda: [state.fingerprint() for _ in range(2)],
    }


def keep_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 22)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="put the table into README.md or docs/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    loops = runs(options.elements)
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in trange(options.rounds + 1):
        for name, run in loops.items():
            begin = time.process_time()
            run()
            if round_:  # the first compiles and warms up
                times[name].append(time.process_time() - begin)
    base = times["two float updates"]
    rows = [
        {"name": name, "milliseconds": median(taken) * 1e3, "ratio": median(a / b for a, b in zip(taken, base, strict=True))}
        for name, taken in times.items()
    ]
    save("arithmetic", rows, COLUMNS, options.readme)


if __name__ == "__main__":
    main()
