"""packed_linear.py: the faster product is the plain one, and follows every change of its weight."""

import copy

import pytest
import torch

import packed_linear
from packed_linear import FEW, PackedLinear, nothing_trains, pack

pytestmark = pytest.mark.skipif(not packed_linear.AVAILABLE, reason="this torch has no packed product")


@pytest.fixture
def big():
    """A packed layer, large enough to be one."""
    torch.manual_seed(0)
    holder = torch.nn.ModuleList([torch.nn.Linear(512, 300), torch.nn.Linear(8, 8)])
    pack(holder)
    assert type(holder[0]) is PackedLinear and type(holder[1]) is torch.nn.Linear
    return holder[0]


@pytest.fixture
def x():
    return torch.randn(2, 5, 512, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def products(monkeypatch):
    """Counts the products on a packed weight."""
    seen, real = [], torch.ops.mkldnn._linear_pointwise

    def product(*args):
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", product)
    return seen


def close(a, b, atol=1e-3):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_packed_product_is_the_plain_one_and_follows_its_weight(big, x, products):
    big.requires_grad_(False)
    ones = {"weight": torch.ones(300, 512), "bias": torch.zeros(300)}
    for change in (lambda: None, lambda: big.weight.mul_(-2), lambda: big.load_state_dict(ones)):
        with torch.no_grad():
            change()
            close(big(x), x @ big.weight.T + big.bias)
            close(copy.deepcopy(big)(x), big(x), 0)
    assert len(products) == 9


def test_with_gradients_the_product_is_torch_s_own(big, x, products):
    big(x).sum().backward()
    close(big.weight.grad, x.sum((0, 1)).expand(300, 512))
    with nothing_trains():
        big(x).sum().backward()
    assert not products


@pytest.mark.parametrize("fused", [False, True])
def test_packed_product_follows_an_optimizer(big, x, fused):
    """A fused step does not move the weight's version counter."""
    big(x).sum().backward()
    with torch.no_grad(), nothing_trains():
        before = big(x)
    torch.optim.AdamW([big.weight], lr=0.1, fused=fused).step()
    with torch.no_grad(), nothing_trains():
        assert (big(x) - before).abs().max() > 0.5
        close(big(x), x @ big.weight.T + big.bias, 1e-2)
    with torch.no_grad():
        close(big(x), x @ big.weight.T + big.bias, 1e-2)


def test_only_few_float32_rows_are_multiplied_so(big, products):
    big.requires_grad_(False)
    with torch.no_grad():
        for rows, count in ((FEW, 1), (FEW + 1, 1)):
            x = torch.randn(rows, 512)
            close(big(x), x @ big.weight.T + big.bias)
            assert len(products) == count
        big.double()(x.double())
        assert len(products) == 1


def test_a_weight_that_trains_is_packed_only_where_nothing_may_change(big, x, products):
    with torch.no_grad():
        big(x)
        assert not products
        with nothing_trains():
            big(x)
        assert len(products) == 1
        big(x)
        assert len(products) == 1
