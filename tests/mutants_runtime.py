"""The mutants of the arithmetic, the tape and the replay, for `mutate.py`, and the tests that have to notice them.

Left out are changes that alter no result: `if False` in `ReversingTape.hand_out` (the tape then steps back out of the half-way point and
into it again), `.to(dtype)` in `_Shear.backward` (autograd casts by itself), `gamma and` there (0 times a finite gradient adds nothing),
`if True` in `State._make_room` (tighter bounds, one more read), `bound >= 0.5` and `bits > reach` (they save bytes that hold zeros).
"""

from __future__ import annotations

TAPE = ["tests/test_tape.py", "tests/test_everyday.py", "tests/test_memory.py", "tests/test_transforms.py"]
ARITHMETIC = ["tests/test_fixed_point.py", "tests/test_dtypes.py"]
TESTS = {
    "mnet_fx/tape.py": TAPE,
    "mnet_fx/replay.py": [*TAPE, "tests/test_threads.py"],
    "mnet_fx/fixed_point.py": ARITHMETIC,
    "mnet_fx/loops.py": ARITHMETIC,
}

# File, what stands there once, what the mutant has in its place.
MUTANTS: list[tuple[str, str, str]] = [
    # What is checked in a rerun.
    ("mnet_fx/tape.py", "if (what := self.reruns[t].conditions.changed()) is not None:", "if (what := None) is not None:"),
    (
        "mnet_fx/tape.py",
        "except (MnetError, torch.OutOfMemoryError):\n            raise\n",
        "except torch.OutOfMemoryError:\n            raise\n",
    ),
    ("mnet_fx/tape.py", 'if self.on_drift == "raise":', "if False:"),
    ("mnet_fx/tape.py", '0 if self.on_drift == "ignore" else of().item()', '0 if self.on_drift != "raise" else of().item()'),
    ("mnet_fx/tape.py", "self.from_rest = state.v_bound == 0.0", "self.from_rest = True"),
    (
        "mnet_fx/tape.py",
        "self.half = False\n        if self.fingerprint(self.state.fingerprint) != self.prints[t]:",
        "self.half = False\n        if False:",
    ),
    ("mnet_fx/tape.py", "if self.fingerprint(self.state.fingerprint) != self.prints[self.time]:", "if False:"),
    ("mnet_fx/tape.py", "if self.fingerprint(lambda: fingerprint(x)) != print_:", "if False:"),
    ("mnet_fx/tape.py", "if self.fingerprint(lambda: fingerprint(y)) != self.prints[t]:", "if False:"),
    ("mnet_fx/tape.py", 'proof=tape.on_drift != "ignore"', "proof=False"),
    ("mnet_fx/tape.py", "if version is not None and x._version != version:", "if False:"),
    ("mnet_fx/tape.py", "except CheckpointError as error:", "except MnetError as error:"),
    ("mnet_fx/tape.py", "if transformed() and not isinstance(self.tape, FloatTape):", "if False:"),
    # Where the tape is.
    ("mnet_fx/tape.py", "if self.half and self.time == t:", "if self.half:"),
    ("mnet_fx/tape.py", "self._seek(t + 1)\n", "self._seek(t)\n"),
    ("mnet_fx/tape.py", "del self.records[self.time :]", "pass"),
    ("mnet_fx/tape.py", "self.state.restep_x(self.records[self.time])", "pass"),
    ("mnet_fx/tape.py", "self.half, self.time = False, self.time + 1", "self.half = False"),
    ("mnet_fx/tape.py", "while x is not None and self.time < t:", "while x is not None and self.time < t - 1:"),
    ("mnet_fx/tape.py", "while self.time > t:", "while self.time > t + 1:"),
    ("mnet_fx/tape.py", "        if rerun:\n            step.tape.close(step.t, y)\n", ""),
    ("mnet_fx/tape.py", "ctx.save_for_backward(y.new_empty(0))", "ctx.save_for_backward()"),
    # What is kept, and what gradients see.
    ("mnet_fx/tape.py", "with torch.autograd.graph.saved_tensors_hooks(Tensor.detach, lambda t: t):", "if True:"),
    ("mnet_fx/tape.py", "self.rerun(self.time, x)[0].detach()", "self.rerun(self.time, x)[0]"),
    ("mnet_fx/tape.py", "self.inputs.append((x.detach(), ", "self.inputs.append((x, "),
    ("mnet_fx/tape.py", "        del self.state\n", ""),
    ("mnet_fx/tape.py", "x.detach().requires_grad_(self.requires_grad)", "x.detach().requires_grad_(True)"),
    ("mnet_fx/tape.py", "x, self.live = self.live, None", "x = self.live"),
    ("mnet_fx/tape.py", "with undisturbed():", "if True:"),
    ("mnet_fx/tape.py", "if gv is None and gx is not None and ctx.needs_input_grad[1]:", "if False:"),
    ("mnet_fx/tape.py", "total = gx if gv is None else", "total = gx if gx is not None else"),
    ("mnet_fx/tape.py", "y.to(torch.promote_types(dtype, torch.float32))", "y.to(dtype)"),
    # What a rerun sees.
    ("mnet_fx/replay.py", "generator.set_rng_state(state)\n", "pass\n"),
    ("mnet_fx/replay.py", "stack.callback(generator.set_rng_state, generator.get_rng_state())", "pass"),
    ("mnet_fx/replay.py", "in generators if not torch.equal(state, module.get_rng_state())]", "in generators]"),
    ("mnet_fx/replay.py", 'partial(setattr, module, "training"), training, module.training)', "id, 0, 0)"),
    ("mnet_fx/replay.py", "_swap_in(stack, torch.set_num_threads, self.threads, torch.get_num_threads())", "pass"),
    ("mnet_fx/replay.py", "stack.callback(setter, now)", "pass"),
    ("mnet_fx/replay.py", "for context in self.autocast if self.autocast != _autocast_states(self.device) else ():", "for context in ():"),
    ("mnet_fx/replay.py", '"dtype": torch.get_autocast_dtype(kind)', '"dtype": torch.bfloat16'),
    ("mnet_fx/replay.py", "stack.enter_context(torch.enable_grad())", "pass"),
    ("mnet_fx/replay.py", "{name: p for name, p in self.parameters.items() if live.get(name) is not p}", "{}"),
    ("mnet_fx/replay.py", "copies = {name: b.detach().clone() for", "copies = {name: b.detach() for"),
    ("mnet_fx/replay.py", "if after.get(name) is not before[name] or was[name] != now[name]:", "if after.get(name) is not before[name]:"),
    ("mnet_fx/replay.py", "if after.get(name) is not before[name] or was[name] != now[name]:", "if was[name] != now[name]:"),
    ("mnet_fx/replay.py", "swapped |= {name: b.clone() for", "swapped |= {name: b for"),
    (
        "mnet_fx/replay.py",
        "with torch.inference_mode(False), temporarily_clear_interpreter_stack():",
        "with temporarily_clear_interpreter_stack():",
    ),
    ("mnet_fx/replay.py", "with torch.inference_mode(False), temporarily_clear_interpreter_stack():", "with torch.inference_mode(False):"),
    (
        "mnet_fx/replay.py",
        "for _ in range(levels):\n        torch._C._vmapmode_decrement_nesting()",
        "for _ in range(1):\n        torch._C._vmapmode_decrement_nesting()",
    ),
    (
        "mnet_fx/replay.py",
        "for _ in range(levels - 1):\n            torch._C._vmapmode_increment_nesting()",
        "pass",
    ),
    ("mnet_fx/replay.py", "or forward_ad._current_level >= 0", ""),
    ("mnet_fx/replay.py", "with _LOCK:\n            generators", "if True:\n            generators"),
    ("mnet_fx/replay.py", "with _LOCK, self._restored():", "with self._restored():"),
    # What the proof looks at.
    ("mnet_fx/replay.py", "{f\"parameter '{self.path_of(name)}'\": p for name, p in self.parameters.items()}", "{}"),
    ("mnet_fx/replay.py", 'return named | {f"side input {i}"', 'return named or {f"side input {i}"'),
    ("mnet_fx/replay.py", "self.proven[key], self.prints[key] = before[name], was[name]", "pass"),
    ("mnet_fx/replay.py", "next((name for name, t in proven.items() if _freed(t)), None)", "None"),
    ("mnet_fx/replay.py", "name: None if t.is_inference() else t._version for", "name: None for"),
    ("mnet_fx/replay.py", "None if t.is_inference() else t._version", "t._version"),
    # The recurrence in integers.
    ("mnet_fx/fixed_point.py", "bits=30, limit", "bits=26, limit"),
    ("mnet_fx/fixed_point.py", "self.fine = 2 + math.ceil(math.log2(max(horizon, 1.0)))", "self.fine = 0"),
    ("mnet_fx/fixed_point.py", "_exponent(max(self.x_bound, self.v_bound))", "_exponent(self.x_bound)"),
    ("mnet_fx/fixed_point.py", "self.x_bound += 0.5 * self.unit if self.x_bound else 0.0", "pass"),
    ("mnet_fx/fixed_point.py", "self.v_bound += 0.5 * self.unit * self.ratio if self.v_bound else 0.0", "pass"),
    ("mnet_fx/fixed_point.py", "self.mask = bad if self.mask is None else self.mask | bad", "self.mask = bad"),
    ("mnet_fx/fixed_point.py", "t if strides(t) == strides(self.X) else", "t if True else"),
    ("mnet_fx/fixed_point.py", "record.finite = self.mask is record.mask", "pass"),
    ("mnet_fx/fixed_point.py", "self._widen(Format.of(self.dtype))", "pass"),
    ("mnet_fx/fixed_point.py", "if self.x_bound > torch.finfo(self.dtype).max:", "if False:"),
    ("mnet_fx/fixed_point.py", "-self.format.widening(record.format))\n        return self.read()", "0)\n        return self.read()"),
    (
        "mnet_fx/fixed_point.py",
        "spill(self.X, record.x_spill.bits, self.format.limit)",
        "spill(self.X, record.x_spill.bits - 1, self.format.limit)",
    ),
    ("mnet_fx/fixed_point.py", "self.mask, record.mask = record.mask, self.mask", "self.mask = record.mask"),
    ("mnet_fx/fixed_point.py", "self.dtype, record.dtype = record.dtype, self.dtype", "pass"),
    ("mnet_fx/fixed_point.py", "            self.ratio *= 2.0**bits\n        else:", "            pass\n        else:"),
    ("mnet_fx/fixed_point.py", "slack = self.ratio * self.unit", "slack = 0.0"),
    ("mnet_fx/fixed_point.py", "if x_bound < self.format.limit * self.unit - 4 * self.unit:", "if True:"),
    ("mnet_fx/fixed_point.py", "        self.ratio *= 2.0**-bits\n", ""),
    ("mnet_fx/fixed_point.py", "if self.v_bound == 0.0:", "if False:"),
    ("mnet_fx/fixed_point.py", "gamma == 0.0 or self.ratio < 2.0**-300", "gamma == 0.0"),
    ("mnet_fx/fixed_point.py", "elif v_bound >= self.format.u_limit * self.ratio * self.unit:", "elif False:"),
    ("mnet_fx/fixed_point.py", "bits = 8 * math.floor(", "bits = 8 * math.ceil("),
    # The loops.
    ("mnet_fx/loops.py", "mul_(scale).round_().add_(0.0))", "mul_(scale).round_())"),
    ("mnet_fx/loops.py", "return 2.0**-126 <= unit <= 2.0**96", "return True"),
    ("mnet_fx/loops.py", "return max(-low, high)", "return high"),
    ("mnet_fx/loops.py", "reach = math.ceil(math.log2(max(bound, 1.0) + 1))", "reach = math.ceil(math.log2(max(bound, 1.0)))"),
    ("mnet_fx/loops.py", "store[plane, start : start + size].copy_(", "store[plane, :size].copy_("),
    ("mnet_fx/loops.py", "t.detach().resolve_conj().resolve_neg()", "t.detach()"),
    ("mnet_fx/loops.py", "elements.clone() if elements.storage_offset() % per_word else elements", "elements"),
    ("mnet_fx/loops.py", ".to(torch.int64)] if spare else []", ".to(torch.int64)][:0] if spare else []"),
    ("mnet_fx/loops.py", "return [table.sum(0), table.sum(1), ", "return [table.sum(0), "),
    ("mnet_fx/loops.py", "return [table.sum(0), table.sum(1), ", "return [table.sum(1), "),
    ("mnet_fx/loops.py", "words[rows * row :], *parts]", "*parts]"),
    ("mnet_fx/loops.py", "z = z + _places(tuple(lengths) or (z.numel(),), z.device)", "z = z + 0"),
]
