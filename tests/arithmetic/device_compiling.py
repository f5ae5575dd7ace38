"""Compiles every kernel for GPUs that are not here, and looks at what came out. A plain script; `test_device_state` runs it.

The interpreter lets through what a compiler does not (a loop variable that changes its dtype), and says nothing about rounding.
"""

import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mnet_fx.arithmetic import device_state
from mnet_fx.arithmetic.formats import Format
from mnet_fx.arithmetic.kernels import device, device_decide, device_hash, device_math

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
MOST_REGISTERS = 96


def built(kernel, capability, types, constants, divisible=True):
    """A compiled kernel. types: of the arguments that are no int32; divisible: n by 16."""
    names, constants = kernel.arg_names, {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = {"ledger": "*i64", "sums": "*i64", "mailbox": "i64", **types}
    signature = {a: "constexpr" if a in constants else types.get(a, "i32") for a in names}
    sharp = [a for a in names if signature[a].startswith("*") or (a == "n" and divisible)]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(names.index(a),): [["tt.divisibility", 16]] for a in sharp},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=device_math.OPTIONS)


def disassembled(compiled):
    """(SASS, registers)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = subprocess.run([TOOLS / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sass, int(re.search(r"REG:(\d+)", usage)[1])


def loads(sass):
    """How wide the loads and stores of whole blocks are, in bits."""
    return [int(width) for width in re.findall(r"(?:LDG|STG)\.E\.(64|128)\b", sass)]


def variants(dtypes):
    """(kernel, types, constants) of all that a chain of these dtypes launches: of the stream, of y and of the next stream."""
    for stream, y in product(dtypes, dtypes):
        out = torch.promote_types(stream, y)
        form = Format.of(out)
        X, U = f"*{NAMES[form.dtype]}", f"*{NAMES[form.u_dtype]}"
        types = {"X": X, "U": U, "y": f"*{NAMES[y]}", "out": f"*{NAMES[out]}", "x0": f"*{NAMES[stream]}", "v0": f"*{NAMES[y]}"}
        types["given"] = types["x0"]
        top = device_state._TOPS[out]
        for some in (True, False):
            base = {
                "PROOF": some,
                "STORE": some,
                "HAS_V": some,
                "RESTEP": not some,
                "CHECK": True,
                "BLOCK": device_state.BLOCK,
            }
            limits = {"LIMIT": form.limit, "ULIMIT": form.u_limit, "BITS": form.bits, "TOP": top}
            yield device_decide.reach, types, base | limits | {"BLOCK": device_state.REACH_BLOCK}
            yield device_decide.start, types, base | limits | {"BLOCK": device_state.REACH_BLOCK}
            for kernel in (device.fill, device.shear, device.unshear_x, device.unshear_u):
                yield kernel, types | ({"out": X} if base["RESTEP"] and kernel is device.unshear_x else {}), base
        yield device.read, types, base
        yield device.note, types, base
        narrow = Format.of(stream)
        yield device.recode, {"X": f"*{NAMES[narrow.dtype]}", "U": f"*{NAMES[narrow.u_dtype]}", "X2": X, "U2": U}, base


def main(capability, dtypes):
    widest, most, seen = {}, 0, set()
    for kernel, types, constants in variants(dtypes):
        name = kernel.__name__
        types = {k: v for k, v in types.items() if k in kernel.arg_names}
        constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
        if (key := (name, str(types), str(constants))) in seen:
            continue
        seen.add(key)
        compiled = built(kernel, capability, types, constants)
        ptx = compiled.asm["ptx"]
        assert ".ftz" not in ptx, f"{name}: flushes what is not normal"
        for wrong in ("fma.rn.f", "div.full", "div.approx", "rcp.", "cvt.rz.s32.f64", "sqrt"):
            assert wrong not in ptx, f"{name} {types}: {wrong}"
        sass, registers = disassembled(compiled)
        print(name, types, constants.get("PROOF"), registers, sorted(set(loads(sass))), flush=True) if "-v" in sys.argv else None
        most = max(most, registers)
        assert registers < MOST_REGISTERS, f"{name} {types}: {registers} registers"
        widest[name] = max([widest.get(name, 0), *loads(sass)])
    assert all(widest[name] == 128 for name in ("reach", "shear", "unshear_x", "unshear_u")), widest
    for kernel in (device_hash.hash_table, device_hash.hash_one):
        for size in ("i32", "i64"):
            built(kernel, capability, {"table": "*i64", "address": "i64", "size": size}, {"BLOCK": 1024})
    print(f"sm_{capability}: {len(seen) + 2} kernels, at most {most} registers")


if __name__ == "__main__":
    numbers = [a for a in sys.argv[1:] if a.isdigit()]
    for capability in map(int, numbers or ["80", "90"]):
        main(capability, tuple(NAMES)[:4] if "--all" in sys.argv or "-v" in sys.argv else (torch.float32, torch.bfloat16))
