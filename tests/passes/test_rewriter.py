"""Before and after, as text; and whole models, which must compute what they did."""

from __future__ import annotations

import textwrap

import pytest
import torch
import torch.nn.functional as F
import torchvision
from passes_models import PlainRegion, by_dynamo, codes, lengths, linears, program, rewritten, traced
from torch import nn
from torchvision.models.video import mvit

from passes import RegionCode, plan, preview, rewrite


def show(text: str) -> str:
    """The code of a graph without the lines and endings that free values."""
    lines = (line.split(";")[0].rstrip() for line in text.strip().splitlines())
    return "\n".join(line for line in lines if line)


def expect(text: str) -> str:
    return textwrap.dedent(text).strip()


def forward(self, x, mask):
    x = self.stem(x)
    for f, norm in zip(self.f, self.norm, strict=True):
        h = f(norm(x)) * self.gain
        x = x + F.relu(h) * mask
    return self.head(x), h


def example() -> nn.Module:
    return program(
        forward,
        stem=nn.Linear(4, 4),
        f=linears(2),
        norm=[nn.LayerNorm(4) for _ in range(2)],
        gain=nn.Parameter(torch.ones(4)),
        head=nn.Linear(4, 4),
    )


def test_before_and_after():
    model = example()
    gm = traced(model)
    assert show(gm.code) == expect(
        """
        def forward(self, x, mask):
            stem = self.stem(x)
            norm_0 = getattr(self.norm, "0")(stem)
            f_0 = getattr(self.f, "0")(norm_0)
            gain = self.gain
            mul = f_0 * gain
            relu = torch.nn.functional.relu(mul, inplace = False)
            mul_1 = relu * mask
            add = stem + mul_1
            norm_1 = getattr(self.norm, "1")(add)
            f_1 = getattr(self.f, "1")(norm_1)
            gain_1 = self.gain
            mul_2 = f_1 * gain_1
            relu_1 = torch.nn.functional.relu(mul_2, inplace = False)
            mul_3 = relu_1 * mask
            add_1 = add + mul_3
            head = self.head(add_1)
            return (head, mul_2)
        """
    )
    assert show(rewritten(model, gm, plan(gm)).code) == expect(
        """
        def forward(self, x, mask):
            stem = self.stem(x)
            momentum_region_0 = self.momentum_region_0(stem, mask)
            add_1 = momentum_region_0[0]
            mul_2 = momentum_region_0[1]
            head = self.head(add_1)
            return (head, mul_2)
        """
    )


def test_the_code_of_a_region():
    model = example()
    gm = traced(model)
    seen: list[RegionCode] = []

    def build(code: RegionCode) -> nn.Module:
        seen.append(code)
        return PlainRegion(model, code)

    rewrite(gm, plan(gm), build)
    first, second = seen[0].steps
    assert show(first.body.python_code("self").src) == expect(
        """
        def forward(self, x, s0):
            a0 = self.a0
            m0 = self.m0(x)
            m1 = self.m1(m0)
            mul = m1 * a0
            relu = torch.nn.functional.relu(mul, inplace = False)
            mul_1 = relu * s0
            return (mul_1,)
        """
    )
    assert "return (mul_1, mul)" in second.body.python_code("self").src
    assert first.body is not second.body
    assert (first.modules, first.attributes, first.sides, first.extras, first.form) == (("norm.0", "f.0"), ("gain",), (0,), 0, "branch")
    assert (second.modules, second.attributes, second.sides, second.extras) == (("norm.1", "f.1"), ("gain",), (0,), 1)


def test_bodies_are_shared_exactly_if_the_code_is_equal():
    def varied(self, x):
        for scale in (1, 1.0, 2, 1):
            x = x + self.f(x) * scale
        x = x + self.f(self.f(x))
        x = x + self.f(self.g(x))
        return x + self.g(self.f(x))

    model = program(varied, f=nn.Linear(4, 4), g=nn.Linear(4, 4))
    gm = traced(model)
    bodies: list[object] = []

    def build(code: RegionCode) -> nn.Module:
        bodies.extend(step.body for step in code.steps)
        return nn.Identity()

    rewrite(gm, plan(gm), build)
    order = [next(i for i, other in enumerate(bodies) if other is body) for body in bodies]
    assert order == [0, 1, 2, 0, 4, 5, 5]


def test_readers_of_an_escape_wait_for_the_region():
    def reads_early(self, x):
        x1 = x + self.f[0](x)
        early = self.head(x1).relu_()  # as something writes to it, it is not made within the step
        x2 = x1 + self.f[1](x1)
        return early, x2 + self.f[2](x2)

    model = program(reads_early, f=linears(3), head=nn.Linear(4, 4))
    gm = traced(model)
    assert show(rewritten(model, gm, plan(gm)).code) == expect(
        """
        def forward(self, x):
            momentum_region_0 = self.momentum_region_0(x)
            add_2 = momentum_region_0[0]
            add = momentum_region_0[1]
            head = self.head(add)
            relu_ = head.relu_()
            return (relu_, add_2)
        """
    )


def test_names_do_not_collide():
    model = program(lambda self, x: self.momentum_region_0(self.f(x)), f=program(two, f=linears(2)), momentum_region_0=nn.Linear(4, 4))
    gm = traced(model)
    found = plan(gm)
    assert [region.name for region in found.regions] == ["momentum_region_1"]
    x = torch.randn(2, 4)
    assert torch.equal(rewritten(model, gm, found)(x), model(x))


def two(self, x):
    for f in self.f:
        x = x + f(x)
    return x


def test_nothing_to_rewrite():
    gm = traced(program(lambda self, x: self.f[0](x), f=linears(1)))
    result = rewrite(gm, plan(gm), lambda code: nn.Identity())
    assert result.graph_module is gm
    assert not result.modified


def test_a_rewritten_graph_has_nothing_left_to_rewrite():
    model = example()
    gm = traced(model)
    again = plan(rewritten(model, gm, plan(gm)))
    assert again.residual_adds == ()


FAMILIES = [
    # name, regions, regions with granularity "module", refused, pixels
    ("resnet101", [2, 3, 22, 2], None, ["projection_shortcut"] * 4, 32),
    ("resnext50_32x4d", [2, 3, 5, 2], None, ["projection_shortcut"] * 4, 64),
    ("wide_resnet50_2", [2, 3, 5, 2], None, ["projection_shortcut"] * 4, 32),
    ("regnet_y_400mf", [2, 5, 5], None, ["projection_shortcut"] * 4, 64),
    ("vit_b_16", [24], [12], [], 224),
    ("swin_t", [4, 4, 12, 4], [2, 2, 6, 2], [], 64),
    ("convnext_tiny", [3, 3, 9, 3], None, [], 64),
    ("efficientnet_b0", [2, 2, 3], None, ["too_short"] * 2, 64),
    ("mobilenet_v2", [2, 3, 2, 2], None, ["too_short"], 64),
    ("mobilenet_v3_large", [2, 3, 2], None, ["too_short"] * 3, 64),
    ("mobilenet_v3_small", [2, 2], None, ["too_short"] * 2, 64),
    ("googlenet", [], None, [], 64),
]


@pytest.mark.parametrize(("name", "regions", "blocks", "refused", "pixels"), FAMILIES, ids=[family[0] for family in FAMILIES])
def test_families(name, regions, blocks, refused, pixels):
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    for parameter in model.parameters():  # LayerScale starts at 1e-6, which would hide a wrong branch
        if parameter.ndim == 1 or name == "convnext_tiny":
            nn.init.uniform_(parameter, 0.5, 1.5) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, 3, pixels, pixels)
    for training in (True, False):
        gm = traced(model.train(training))
        for granularity, expected in (("add", regions), ("module", blocks or regions)):
            found = plan(gm, granularity=granularity)
            assert (lengths(found), codes(found)) == (expected, refused)
            new = rewritten(model, gm, found)
            if not training and expected and (granularity == "add" or blocks):
                with torch.no_grad():
                    assert torch.equal(new(x), model(x))


@pytest.mark.parametrize(("name", "adds"), [("fasterrcnn_resnet50_fpn", 12), ("ssdlite320_mobilenet_v3_large", 7)])
def test_detection_backbones(name, adds):
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    found = preview(model)
    assert "" in found.opaque
    assert len(plan(found.parts["backbone"]).rewritten_adds) == adds


def test_effects_without_a_name_stay_in_their_step():
    """MViT adds its queries and relative positions into slices of its values, by assignments whose result nobody reads."""
    block = mvit.MSBlockConfig(1, 8, 8, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2])
    settings = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    model = mvit.MViT((16, 16), 4, [block] * 3, **settings, num_classes=3).eval()
    gm = by_dynamo(model, torch.randn(1, 3, 4, 16, 16))
    found = plan(gm)
    effects = {node.name for node in gm.graph.nodes if node.name.startswith("setitem")}
    inside = {name for region in found.regions for step in region.steps for name in step.nodes}
    assert lengths(found) == [6]
    assert len(effects) == 6
    assert effects <= inside
    assert not any(step.extras for region in found.regions for step in region.steps)
