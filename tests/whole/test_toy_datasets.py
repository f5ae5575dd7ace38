"""The toy data sets are those of the package momentumnet."""

import momentumnet.toy_datasets as theirs
import pytest
import torch

from mnet_fx import toy_datasets as ours

CALLS = [
    ("make_circle", {}),
    ("make_circle", {"radius": 0.5, "N": 7, "label": 2, "noise": 0.0}),
    ("make_data", {}),
    ("make_data", {"N": 20, "n_r": 5}),
    ("random_points_1D", {}),
    ("make_data_1D", {"N": 9}),
]


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_the_same_points_from_the_same_seed(name, arguments):
    found = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        result = getattr(module, name)(**arguments)
        found.append(result if isinstance(result, tuple) else (result,))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, atol=1e-6)


def test_the_same_functions():
    assert {name for name in dir(theirs) if callable(getattr(theirs, name))} == set(ours.__all__)
