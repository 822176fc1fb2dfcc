"""Indices of ⌈log₂ K⌉ bits each, in one stream of bytes: edge e has the bits e·b … (e+1)·b − 1, the lowest first."""

from __future__ import annotations

import numpy as np
import torch
from metazoo.errors import UserError


def bits_for(k: int) -> int:
    """Bits of an index below ``k``: ⌈log₂ k⌉, and 1 where one centroid would need none.

    Raises:
        UserError: k is not within 1 … 65 536.
    """
    if not 1 <= k <= 65536:
        raise UserError(f"a codebook of {k} centroids: give 1 to 65536 (an index has at most 16 bits)")
    return max(1, (k - 1).bit_length())


def pack_indices(indices: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack int64 [E] into uint8 [⌈E·bits/8⌉].

    Raises:
        UserError: bits is not 1 … 16, or an index does not fit.
    """
    _check_bits(bits)
    values = indices.cpu().numpy()
    if values.size and not 0 <= values.min() <= values.max() < 1 << bits:
        raise UserError(
            f"index {values.min() if values.min() < 0 else values.max()} does not fit {bits} bits: use more"
        )
    stream = (values[:, None] >> np.arange(bits)) & 1
    packed = np.packbits(stream.astype(np.uint8).ravel(), bitorder="little")
    return torch.from_numpy(packed).to(indices.device)


def unpack_indices(packed: torch.Tensor, bits: int, count: int, *, start: int = 0) -> torch.Tensor:
    """Indices start … start + count − 1 of a stream, int64 [count].

    Raises:
        UserError: bits is not 1 … 16, or the stream is shorter.
    """
    _check_bits(bits)
    if start < 0 or count < 0 or (start + count) * bits > 8 * len(packed):
        raise UserError(
            f"{len(packed)} bytes hold {8 * len(packed) // bits} indices of {bits} bits, not {start + count}: "
            "the file belongs to another network"
        )
    first = start * bits
    if 8 % bits == 0 and first % 8 == 0:  # whole indices in each byte
        taken = packed[first // 8 : (first + count * bits + 7) // 8]
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((taken.unsqueeze(1) >> shifts) & (2**bits - 1)).flatten()[:count].long()
    position = torch.arange(first, first + count * bits, bits, device=packed.device)
    byte = position >> 3
    value = torch.zeros_like(position)
    for i in range(3):  # 16 bits that start anywhere lie within three bytes
        value |= packed[(byte + i).clamp_(max=len(packed) - 1)].long() << (8 * i)
    return (value >> (position & 7)) & ((1 << bits) - 1)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 16:
        raise UserError(f"an index of {bits} bits: give 1 to 16")
