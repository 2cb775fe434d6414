"""Digests of tensors' bits before and after training: nothing may change but what is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

import torch

from keepsight.train.run.engines import whole


def checksums(model: torch.nn.Module, skip: Collection[str] = ()) -> dict[str, str] | None:
    """Name of every parameter and buffer -> a digest of its bits. (About a second per GB.)

    Args:
        model: any module.
        skip: names to leave out: what is trained.

    Returns:
        None if the weights are partitioned over processes (ZeRO-3), where no process sees them.
    """
    found: dict[str, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in skip or tensor.is_meta:
            continue
        if tensor.numel() == 0:
            return None
        found[name] = digest(whole(tensor))
    return found


def digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's bits."""
    bits = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(bits.data, digest_size=16).hexdigest()


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Names whose tensors differ, or that are only in one of the two."""
    return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
