"""The fast way of a dense layer gives the plain way's values and derivatives, and the precision that was asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cellplane.model import linear as room
from cellplane.model.linear import Linear, affine, in_precision, linear

SHAPES = [(5, 7, 3), (200, 64, 33), (1, 1, 1), (0, 4, 5), (130, 96, 257)]


def given(rows: int, inputs: int, outputs: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


@pytest.fixture(params=["onednn", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(room, "ONEDNN", None)
    elif room.ONEDNN is None:
        pytest.skip("this PyTorch or processor has no oneDNN products")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_derivatives_are_those_of_torch(shape, with_bias):
    x, weight, bias, pull = given(*shape)
    exact = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    ours = [tensor.detach().float().requires_grad_() for tensor in exact]
    expected = F.linear(exact[0], exact[1], exact[2] if with_bias else None)
    found = linear(ours[0], ours[1], ours[2] if with_bias else None, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    expected.backward(pull)
    found.backward(pull.float())
    for one, other in zip(ours[: 2 + with_bias], exact, strict=False):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_a_transposed_weight_is_read_as_it_lies():
    x, weight, *_ = (tensor.float() for tensor in given(20, 8, 8))
    torch.testing.assert_close(affine(x, weight.t()), x @ weight, rtol=1e-5, atol=1e-5)


def test_inputs_of_three_dimensions_keep_their_shape():
    layer = Linear(4, 3)
    x = torch.randn(2, 5, 4)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer(torch.zeros(2, 0, 4)).shape == (2, 0, 3)


def test_a_layer_is_stored_like_torchs_own():
    torch.manual_seed(0)
    ours = Linear(4, 3).state_dict()
    torch.manual_seed(0)
    theirs = torch.nn.Linear(4, 3).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("exact", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_half_precision_reaches_all_layers_but_those_that_decide(exact, dtype):
    layer, x = Linear(8, 8, exact=exact), torch.randn(3, 8)
    with in_precision("bfloat16", x.device):
        out = layer(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    with in_precision("float32", x.device):
        assert layer(x).dtype == torch.float32


def test_float32_leaves_a_callers_autocast_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16), in_precision("float32", torch.device("cpu")):
        assert Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.bfloat16
