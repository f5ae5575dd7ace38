"""Finds residual chains in a torch.fx graph and rewrites each into one call. Knows nothing of what the call will do.

model --capture--> graphs                       what can be traced, and refusals for what cannot
graph --match--> residual adds --> chains       by dataflow, never by name
chains --plan--> regions                        steps, rules (`legality`), nesting; or a refusal for every add
graph, plan --rewrite--> new graph              `build_region` makes the module of each region
(between the stages: `verify`)
"""

from passes.calls import Call, Calls, inner_calls
from passes.capture import Capture, Captured, capture, capture_by_export, forward_children
from passes.dynamo_graph import LostContextError, Unlifted, lift, unlift
from passes.exporting import ExportError, Interface
from passes.layout import level_layouts
from passes.legality import CODES
from passes.memory import is_hook
from passes.pieces import pieces
from passes.plan import may_join, plan
from passes.regions import Form, Granularity, Plan, PlannedRegion, Refusal, RegionCode, ResidualAdd, Step, StepCode
from passes.rewrite import PassResult, rewrite
from passes.tracer import Blame
from passes.verify import InvariantError

__all__ = [
    "CODES",
    "Blame",
    "Call",
    "Calls",
    "Capture",
    "Captured",
    "ExportError",
    "Form",
    "Granularity",
    "Interface",
    "InvariantError",
    "LostContextError",
    "PassResult",
    "Plan",
    "PlannedRegion",
    "Refusal",
    "RegionCode",
    "ResidualAdd",
    "Step",
    "StepCode",
    "Unlifted",
    "capture",
    "capture_by_export",
    "forward_children",
    "inner_calls",
    "is_hook",
    "level_layouts",
    "lift",
    "may_join",
    "pieces",
    "plan",
    "rewrite",
    "unlift",
]
