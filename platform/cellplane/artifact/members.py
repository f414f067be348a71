"""Several networks that answer as one: the same recipe begun from several seeds, whose probabilities are averaged.

Each is wrong in its own way where cells are few, and the mean is wrong less often (Hansen and Salamon, "Neural network
ensembles", IEEE PAMI 12, 1990). The model folder's own weights are the first; the others are an attachment. They share the
first one's configuration, genes and classes; embeddings are the first one's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cellplane.artifact.folder import MEMBERS, pack_tensors, unpack_tensors
from cellplane.errors import FileFormatError


def pack_members(weights: Sequence[Mapping[str, Tensor]]) -> dict[str, bytes]:
    """The attachment of the members behind the first, {name: bytes}; nothing for none."""
    if not weights:
        return {}
    return {MEMBERS: pack_tensors({f"{number}/{name}": tensor for number, one in enumerate(weights, 1) for name, tensor in one.items()})}


def members_of(attachments: Mapping[str, bytes]) -> list[dict[str, Tensor]]:
    """Weights of the members behind the first, in their order; FileFormatError for names that are not a member's."""
    if MEMBERS not in attachments:
        return []
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in unpack_tensors(attachments[MEMBERS]).items():
        number, _, rest = name.partition("/")
        if not (number.isdecimal() and rest):
            raise FileFormatError(f"{MEMBERS} holds {name!r}, which is no tensor of a member: expected NUMBER/NAME")
        found.setdefault(int(number), {})[rest] = tensor
    return [found[number] for number in sorted(found)]


def together(networks: Sequence[Callable[[Any], Any]], batch: Any) -> Any:
    """What the first network says of the batch, a dataclass, its ``logits`` those of all networks' mean."""
    first, *others = [network(batch) for network in networks]
    return replace(first, logits=agreed([one.logits for one in (first, *others)])) if others else first


def agreed(logits: Sequence[Tensor]) -> Tensor:
    """Logits [C, K] of the mean of several networks' probabilities."""
    return torch.logsumexp(torch.stack([F.log_softmax(one.float(), dim=-1) for one in logits]), dim=0) - torch.tensor(len(logits)).log()
