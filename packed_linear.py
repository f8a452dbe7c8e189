"""A faster product for decoding on a CPU, behind one call: `pack(module)`. The method does not depend on it.

A decoding step multiplies a few rows with every weight of the model. torch's own product for that (BLAS) reads a
weight in the order in which it is stored. oneDNN reads it in an order of its own, which is about twice as fast for
few rows, but the weight has to be re-ordered ("packed") first. That pays where one weight serves many steps, as in a
rollout.

The result is equal up to rounding. docs/cost.md says what it brings.
"""

import contextlib

import torch
from torch import nn

AVAILABLE = hasattr(torch.ops.mkldnn, "_linear_pointwise") and torch.backends.mkldnn.is_available()
SMALL = 2**17  # a weight with fewer numbers gains nothing
FEW = 128  # so many rows at most; with more, BLAS is as fast


class Packed(tuple):
    """(version, weight in oneDNN's own layout). It cannot be copied: a copied layer packs its own."""

    def __deepcopy__(self, memo):
        return Packed((None, None))


class PackedLinear(nn.Linear):
    """nn.Linear whose product with few rows runs on a packed weight: without gradients, in float32, on a CPU.

    Only for a weight that does not change. A frozen weight has a version counter, which tells if it was loaded anew.
    A weight that trains is packed within `nothing_trains` alone, because optimizers need not count their steps."""

    enabled = AVAILABLE
    packed = Packed((None, None))
    promise = None  # set within `nothing_trains`

    def forward(self, x):
        version = self.version()
        if version is None or not self.fits(x):
            return super().forward(x)
        if self.packed[0] != version:
            self.packed = Packed((version, torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 8)))
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[1], self.bias, "none", [], "")

    def version(self):
        """What the packed weight is valid for; None: the weight may change at any time."""
        if self.weight.requires_grad:
            return PackedLinear.promise
        return self.weight.data_ptr(), self.weight._version

    def fits(self, x):
        if not self.enabled or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return False
        float32 = x.dtype == self.weight.dtype == torch.float32
        return float32 and x.device.type == "cpu" and x.numel() <= FEW * x.shape[-1]


def product(weight):
    """-> function: x (..., in) -> x weight^T in float32 on a CPU, for a weight that does not change; no gradient.

    The weight is packed at once, for any number of rows."""
    if not PackedLinear.enabled:
        return lambda x: nn.functional.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, FEW)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@contextlib.contextmanager
def nothing_trains():
    """Promises that no weight changes inside. Those that train are packed once, anew for each use of this."""
    PackedLinear.promise = object()
    try:
        yield
    finally:
        PackedLinear.promise = None


def pack(module):
    """Give every large nn.Linear in `module` the faster product."""
    for m in module.modules():
        if type(m) is nn.Linear and m.weight.numel() >= SMALL:
            m.__class__ = PackedLinear
