"""Finds residual chains in a torch.fx graph and rewrites each into one call. Knows nothing of what the call will do.

graph --match--> residual adds --> chains       by dataflow, never by name
chains --plan--> regions                        steps, rules (`planning.rules`), nesting; or a refusal for every add
graph, plan --rewrite--> new graph              `build_region` makes the module of each region
(between the stages: `verify`; around them, for graphs of Dynamo: `unlift`, `lift`, `pieces`)
"""

from passes.capturing.checkpointed import checkpoints, written_out
from passes.capturing.dynamo import LostContextError, Unlifted, lift, modules_run, state_change, unlift
from passes.capturing.grad_modes import is_off, needs_gradient
from passes.capturing.layouts import level_layouts
from passes.capturing.previewing import Preview, preview
from passes.graphs.facts import joined, owner_stack
from passes.graphs.writes import is_hook
from passes.planning.planner import plan
from passes.planning.spans import common_path
from passes.planning.stretches import with_stretches
from passes.refusals import CODES
from passes.regions import Form, Granularity, Plan, PlannedRegion, Refusal, RegionCode, ResidualAdd, Step, StepCode, Stretch, Total
from passes.rewriting.costs import costs_of_steps, elements, largest_step, saved_by_own
from passes.rewriting.heads import Head, chunked_heads, heads
from passes.rewriting.invariants import InvariantError
from passes.rewriting.rewriter import PassResult, rewrite
from passes.rewriting.segments import Cost, cutting
from passes.rewriting.splitting import COST, OVERWRITTEN, PROOF, pieces

__all__ = [
    "CODES",
    "COST",
    "OVERWRITTEN",
    "PROOF",
    "Cost",
    "Form",
    "Granularity",
    "Head",
    "InvariantError",
    "LostContextError",
    "PassResult",
    "Plan",
    "PlannedRegion",
    "Preview",
    "Refusal",
    "RegionCode",
    "ResidualAdd",
    "Step",
    "StepCode",
    "Stretch",
    "Total",
    "Unlifted",
    "checkpoints",
    "chunked_heads",
    "common_path",
    "costs_of_steps",
    "cutting",
    "elements",
    "heads",
    "is_hook",
    "is_off",
    "joined",
    "largest_step",
    "level_layouts",
    "lift",
    "modules_run",
    "needs_gradient",
    "owner_stack",
    "pieces",
    "plan",
    "preview",
    "rewrite",
    "saved_by_own",
    "state_change",
    "unlift",
    "with_stretches",
    "written_out",
]
