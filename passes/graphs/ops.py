"""What each node of a graph is, whatever way the model wrote it: the tables of operations (those of layouts: `capturing.layout_ops`).

    kind of a node      examples                            counts as mixing   may stand in a link   result may alias its input
    "add"               a + b, a += b, torch.add            no                 with a number         in place only
    "norm"              LayerNorm, F.batch_norm             no                 yes                   no
    "activation"        ReLU, F.gelu, torch.tanh            no                 yes                   in place only
    "dropout"           Dropout, StochasticDepth            no                 yes                   yes (in eval mode)
    "identity"          Identity, contiguous, clone         no                 yes                   yes
    "cast"              x.to, x.float                       no                 yes                   yes
    "scale"             x * 0.5, x - 1, x / y               no                 with a number         in place only
    "layout"            view, permute, x[0], cat, pad       no                 no                    yes
    "reduce"            mean, norm, amax                    no                 no                    no
    "shape"             x.shape, x.dim(), x.dtype           carries no values of x
    "create"            torch.zeros, torch.arange           no                 no                    no
    "input"             placeholder, get_attr, output
    "convolution", "linear", "pool", "mix"                  yes                no                    no

Whatever is in no table is "mix": an unknown operation may do anything to a value but hide a write. Three dialects are described: that
of symbolic traces (functions, tensor methods, leaf modules), that of Dynamo (the same without leaf modules), and that of torch.export
(operations of torch.ops.aten before decomposition, whose schema says what they write to).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.fx as fx
from torch import nn

__all__ = [
    "FACTORIES",
    "IN_PLACE_OPERATORS",
    "LINKS",
    "MIXING",
    "OUT_OF_PLACE",
    "is_add",
    "is_other_sum",
    "kind",
    "operands",
    "package_of",
    "word_of",
    "words",
]

LINKS = frozenset({"norm", "activation", "dropout", "identity", "cast"})
MIXING = frozenset({"convolution", "linear", "pool", "mix"})


def words(text: str) -> frozenset[str]:
    """The words of a table."""
    return frozenset(text.split())


_ATEN = torch.ops.aten
_ADDS = {operator.add, operator.iadd, torch.add, torch.Tensor.add, torch.Tensor.add_, _ATEN.add.Tensor, _ATEN.add_.Tensor}
_ADD_METHODS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
IN_PLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in words("""
        iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul
    """)
)

# Words name functions of torch and torch.nn.functional, operators and tensor methods alike; a trailing underscore is removed before the
# look-up.
_WORDS: dict[str, str] = {
    "norm": """
        batch_norm layer_norm group_norm instance_norm rms_norm local_response_norm normalize
    """,
    "activation": """
        relu relu6 gelu silu mish elu selu celu leaky_relu prelu rrelu softplus softsign tanh sigmoid hardtanh hardswish hardsigmoid
        hardshrink softshrink tanhshrink threshold logsigmoid swish
    """,
    "dropout": """
        dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout stochastic_depth drop_path
    """,
    "identity": """
        contiguous clone alias requires_grad lift_fresh_copy lift_fresh
    """,
    "cast": """
        to float half bfloat16 double type type_as cuda cpu _to_copy
    """,
    "scale": """
        mul sub rsub div truediv true_divide multiply subtract divide neg pos
    """,
    "elementwise": """
        pow square sqrt rsqrt exp exp2 expm1 log log2 log10 log1p sin cos abs sign erf reciprocal clamp clip maximum minimum where
        masked_fill eq ne lt le gt ge logical_and logical_or logical_not and or xor not invert floordiv mod floor_divide remainder
        lerp addcmul addcdiv softmax log_softmax glu nan_to_num isnan isinf isfinite round floor ceil trunc fill zero copy bernoulli normal
        uniform index is is_not truth not_ and_ or_ lshift rshift fmod
    """,
    "layout": """
        view reshape view_as reshape_as expand expand_as permute transpose t swapaxes swapdims movedim moveaxis flatten unflatten
        ravel squeeze unsqueeze getitem narrow select slice chunk split tensor_split unbind cat concat concatenate stack hstack
        vstack pad roll flip repeat tile repeat_interleave index_select gather take_along_dim masked_select setitem detach
        pixel_shuffle pixel_unshuffle channel_shuffle unfold as_strided diagonal real imag view_as_real view_as_complex adjoint
        rot90 tril triu diag broadcast_to meshgrid index_add index_copy scatter split_with_sizes unsafe_split unsafe_chunk _unsafe_view
        _reshape_alias constant_pad_nd native_channel_shuffle T mT numpy_T H mH matrix_H
    """,
    "reduce": """
        mean sum norm vector_norm amax amin max min var std var_mean std_mean prod any all argmax argmin logsumexp
        frobenius_norm
    """,
    "shape": """
        size dim numel nelement stride ndimension element_size is_floating_point is_complex len is_contiguous _assert get_device
        sym_size sym_stride sym_numel sym_storage_offset sym_constrain_range sym_constrain_range_for_size _assert_tensor_metadata
        _assert_scalar _assert_async
    """,
    "convolution": """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    """,
    "linear": """
        linear matmul mm bmm einsum addmm baddbmm bilinear
    """,
    "pool": """
        avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
        adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate upsample
    """,
}
_KINDS = {word: name for name, text in _WORDS.items() for word in text.split()}

_MODULE_WORDS: dict[str, str] = {
    "norm": """
        BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm LayerNorm GroupNorm RMSNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d
        LocalResponseNorm FrozenBatchNorm2d LayerNorm2d BatchNormAct2d
    """,
    "activation": """
        ReLU ReLU6 GELU SiLU Mish ELU SELU CELU LeakyReLU PReLU RReLU Softplus Softsign Tanh Sigmoid Hardtanh Hardswish Hardsigmoid
        Hardshrink Softshrink Tanhshrink Threshold LogSigmoid
    """,
    "dropout": """
        Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout StochasticDepth DropPath
    """,
    "identity": """
        Identity
    """,
    "elementwise": """
        Softmax Softmax2d LogSoftmax Softmin GLU
    """,
    "layout": """
        Flatten Unflatten PixelShuffle PixelUnshuffle ChannelShuffle ZeroPad1d ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d
        ConstantPad3d ReflectionPad1d ReflectionPad2d ReplicationPad1d ReplicationPad2d CircularPad1d CircularPad2d Permute Fold
        Unfold
    """,
    "convolution": """
        Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    """,
    "linear": """
        Linear Bilinear
    """,
    "pool": """
        AvgPool1d AvgPool2d AvgPool3d MaxPool1d MaxPool2d MaxPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
        AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d LPPool1d LPPool2d Upsample UpsamplingBilinear2d UpsamplingNearest2d
    """,
}
_MODULE_KINDS = {word: name for name, text in _MODULE_WORDS.items() for word in text.split()}

_SHAPE_ATTRIBUTES = words("""
        shape dtype device ndim is_cuda is_cpu is_meta requires_grad layout itemsize nbytes names
    """)
FACTORIES: frozenset[Callable[..., Any]] = frozenset(
    getattr(torch, name)
    for name in words("""
        arange empty eye full linspace logspace ones rand randint randn randperm scalar_tensor tensor zeros normal as_tensor
        tril_indices triu_indices empty_strided range
    """)
)
_FACTORY_WORDS = words("""
        zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones new_empty new_full new_tensor
    """) | frozenset(f.__name__ for f in FACTORIES)


OUT_OF_PLACE = {
    operator.iadd: operator.add,
    torch.Tensor.add_: torch.Tensor.add,
    _ATEN.add_.Tensor: _ATEN.add.Tensor,
    "add_": "add",
    "__iadd__": "__add__",
    operator.isub: operator.sub,
    torch.Tensor.sub_: torch.Tensor.sub,
    _ATEN.sub_.Tensor: _ATEN.sub.Tensor,
    "sub_": "sub",
    "__isub__": "__sub__",
    torch.Tensor.addcmul_: torch.Tensor.addcmul,
    _ATEN.addcmul_.default: _ATEN.addcmul.default,
    "addcmul_": "addcmul",
}
"""The in-place sums, and what does the same out of place."""

_OTHER_SUMS = words("sub subtract addcmul addcdiv lerp addmm baddbmm index_add scatter_add")


def is_other_sum(node: fx.Node) -> bool:
    """True for an operation that adds something other than an operand as it is to its first one, such as `x - f(x)` or addcmul."""
    if node.op not in ("call_function", "call_method") or not _in_torch(node.target) or node.kwargs.get("beta", 1) != 1:
        return False
    first = operands(node)[0] if operands(node) else None
    return word_of(node.target) in _OTHER_SUMS and isinstance(first, fx.Node) and len(node.all_input_nodes) > 1


def is_add(node: fx.Node) -> bool:
    """True for every way to write `a + b`, in place or not."""
    return node.target in (_ADD_METHODS if node.op == "call_method" else _ADDS) and node.op in ("call_function", "call_method")


def operands(node: fx.Node) -> tuple[Any, ...]:
    """The two operands of an add, or the first operands of any other node, keywords `input` and `other` resolved."""
    named = [node.kwargs[name] for name in ("input", "other") if name in node.kwargs]
    return (*node.args, *named) if node.args else tuple(named)


def kind(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Kind of a node, as in the table above.

    Args:
        node: a node of a symbolically traced graph.
        modules: the modules of the graph by path.

    Returns:
        One of the kinds of the table.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return "input"
    if node.op == "call_module":
        cls: Any = type(modules[str(node.target)])
        return _module_kind(cls)
    if is_add(node):
        return "add" if all(isinstance(term, fx.Node) for term in operands(node)[:2]) else "scale"
    if node.target is getattr:
        return "shape" if node.args[1] in _SHAPE_ATTRIBUTES else "layout"
    word = word_of(node.target)
    if word in _FACTORY_WORDS:
        return "create"
    return _KINDS.get(word, "mix") if _in_torch(node.target) else "mix"


@cache
def _module_kind(cls: type) -> str:
    return next((_MODULE_KINDS[base.__name__] for base in cls.__mro__ if base.__name__ in _MODULE_KINDS), "mix")


@cache
def word_of(target: Any) -> str:
    """What the tables call the target of a node."""
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.partition("::")[2]
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    if target in IN_PLACE_OPERATORS:
        name = name[1:]
    return name if name in _KINDS or name in _FACTORY_WORDS else name.rstrip("_")


def _in_torch(target: Any) -> bool:
    """A function that happens to be called `mean` is unknown unless torch or Python made it; methods are taken to be a tensor's."""
    return isinstance(target, str) or package_of(target) in ("torch", "torchvision", "_operator", "builtins", "math")


def package_of(target: Any) -> str:
    """The top package that a function is from; torch for what does not say."""
    return (getattr(target, "__module__", None) or "torch").split(".")[0]
