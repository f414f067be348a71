"""Norms and an activation in the dtype of what they are given, whatever their own parameters are kept in.

Training in half precision keeps bfloat16 parameters beside a float32 stream; PyTorch's own refuse that mixture on a CPU.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm`, the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        """[C, D] -> [C, D]."""
        return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class PReLU(nn.PReLU):
    """`torch.nn.PReLU`, the same parameter."""

    def forward(self, x: Tensor) -> Tensor:
        """The shape it is given."""
        return F.prelu(x, self.weight.to(x.dtype))
