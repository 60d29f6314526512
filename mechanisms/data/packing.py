"""Samples gathered into rows of at most so many tokens."""

from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(lengths: np.ndarray | Sequence[int], capacity: int, seed: int) -> list[list[int]]:
    """Assign samples to rows: longest first, each into the fullest row that still has room for it.

    (Best-fit decreasing needs at most 11/9 of the fewest possible rows plus a constant: Johnson et al., 1974,
    doi:10.1137/0203025; on conversations it is usually within one row of it.)

    Args:
        lengths: int array (samples), none above `capacity`.
        capacity: tokens in a row.
        seed: which of equally long samples comes first.

    Returns:
        list of lists of sample indices. The number of rows depends on the lengths alone.
    """
    lengths = np.asarray(lengths)
    shuffled = np.random.default_rng(seed).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows, with_room = [], [[] for _ in range(capacity + 1)]  # with_room[r]: rows that have room for r more tokens
    occupied = 0  # its bit r is set where with_room[r] is not empty: the fullest row is found by one shift
    for index, length in zip(order.tolist(), lengths[order].tolist()):
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                occupied ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        with_room[room - length].append(row)
        occupied |= 1 << (room - length)
    return rows
