"""Finds residual chains in a torch.fx graph and rewrites each into one call. Knows nothing of what the call will do.

graph --match--> residual adds --> chains       by dataflow, never by name
chains --plan--> regions                        steps, rules (`legality`), nesting; or a refusal for every add
graph, plan --rewrite--> new graph              `build_region` makes the module of each region
(between the stages: `verify`; around them, for graphs of Dynamo: `unlift`, `lift`, `pieces`)
"""

from passes.checkpoints import checkpoints, written_out
from passes.dynamo_graph import LostContextError, Unlifted, lift, modules_run, state_change, unlift
from passes.facts import joined, owner_stack
from passes.layout import level_layouts
from passes.legality import CODES
from passes.memory import is_hook
from passes.pieces import pieces
from passes.plan import plan
from passes.preview import Preview, preview
from passes.regions import Form, Granularity, Plan, PlannedRegion, Refusal, RegionCode, ResidualAdd, Step, StepCode, Stretch
from passes.rewrite import PassResult, rewrite
from passes.stretches import with_stretches
from passes.verify import InvariantError

__all__ = [
    "CODES",
    "Form",
    "Granularity",
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
    "Unlifted",
    "checkpoints",
    "is_hook",
    "joined",
    "level_layouts",
    "lift",
    "modules_run",
    "owner_stack",
    "pieces",
    "plan",
    "preview",
    "rewrite",
    "state_change",
    "unlift",
    "with_stretches",
    "written_out",
]
