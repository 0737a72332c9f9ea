"Modality-aware channel scaling: eq. 1 of LSSC by hand, its start, folding, and what is refused."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg_nb.blocks.channel_scaling import ChannelScaling, NetworkScaling, each_pair, fold_scale, scale_channels
from medseg_nb.core import ShapeError


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_equation_1(classes, width, channels, batch):
    scaling = ChannelScaling(width, channels, classes).double()
    for p in scaling.parameters(): nn.init.normal_(p)
    Q = torch.randn(*[batch]*(batch > 0), classes, width, dtype=torch.double)
    for phi, W in zip(scaling(Q), (scaling.W2, scaling.W3), strict=True):
        expected = 1 + torch.einsum("z,...zk,kd->...d", scaling.w1, Q, W)
        torch.testing.assert_close(phi, expected)


def test_it_starts_at_one_and_can_leave():
    scaling, Q = ChannelScaling(6, 4, classes=3), torch.randn(3, 6, requires_grad=True)
    assert all(torch.equal(phi, torch.ones(4)) for phi in scaling(Q))
    optimiser = torch.optim.SGD([Q, *scaling.parameters()], 0.1)
    start = Q.detach().clone()
    for _ in range(2):                                          # the matrices move in the first step, the embeddings in the second
        optimiser.zero_grad()
        sum((phi - 2).square().sum() for phi in scaling(Q)).backward()
        optimiser.step()
    assert scaling.W2.abs().sum() > 0 and scaling.W3.abs().sum() > 0 and not torch.equal(Q, start)
    assert not torch.equal(scaling.w1, torch.full((3,), 1/3))


@pytest.mark.parametrize("shape", [(2, 7, 5), (2, 3, 4, 5), (2, 2, 3, 4, 5)])
def test_scaling_tokens_slices_and_volumes(shape):
    x, shared, own = torch.randn(shape), torch.randn(5), torch.randn(2, 5)
    assert scale_channels(x, None) is x
    torch.testing.assert_close(scale_channels(x, shared), x @ torch.diag(shared))
    for i in range(2): torch.testing.assert_close(scale_channels(x, own)[i], x[i] @ torch.diag(own[i]))


@pytest.mark.parametrize("bias", [True, False])
def test_folding(bias):
    layer, x, phi = nn.Linear(4, 3, bias=bias), torch.randn(5, 4), torch.randn(3)
    with torch.no_grad(): before = layer(x)*phi
    torch.testing.assert_close(fold_scale(layer, phi)(x), before)


def test_one_pair_a_block():
    pairs = NetworkScaling(6, (4, 8, 4), 3)(torch.randn(2, 3, 6))
    assert [[p.shape for p in pair] for pair in pairs] == [[(2, c)]*2 for c in (4, 8, 4)]
    assert list(each_pair(pairs, 3)) == pairs and list(each_pair(None, 3)) == [None]*3


@pytest.mark.parametrize("wrong", [
    lambda: ChannelScaling(0, 4, 3), lambda: ChannelScaling(6, 0, 3), lambda: ChannelScaling(6, 4, 0),
    lambda: ChannelScaling(6, 4, 3)(torch.zeros(2, 6)), lambda: ChannelScaling(6, 4, 3)(torch.zeros(3, 5)), lambda: ChannelScaling(6, 4, 3)(torch.zeros(6)),
    lambda: scale_channels(torch.zeros(2, 5, 4), torch.zeros(3)), lambda: scale_channels(torch.zeros(2, 5, 4), torch.zeros(3, 4)),
    lambda: each_pair([], 1), lambda: each_pair([(None, None)]*2, 1),
    lambda: fold_scale(nn.Linear(4, 3), torch.zeros(4)), lambda: fold_scale(nn.Linear(4, 3), torch.zeros(2, 3))])
def test_what_does_not_fit(wrong):
    with pytest.raises(ShapeError): wrong()
