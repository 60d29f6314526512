"""Mutations of valid files of every kind, and random bytes: read, or refused with a reason."""

import collections

from mechanisms.data.records import Problems, read_records
from tests.unit.test_formats import KINDS, RECORDS


def mutate(data, random):
    data = bytearray(data)
    for _ in range(random.choice([1, 1, 2, 5, 50])):
        start = random.choice([random.randrange(len(data)), random.randrange(min(len(data), 50)),
                               len(data) - 1 - random.randrange(min(len(data), 50))])
        way = random.randrange(4)
        if way == 0:
            data[start] = random.randrange(256)
        elif way == 1:
            data[start:start + random.randrange(20)] = random.randbytes(random.randrange(20))
        elif way == 2:
            data[start] ^= 1 << random.randrange(8)
        elif len(data) > start > 0:
            del data[start:start + random.choice([1, 10, len(data)])]
        if not data:
            data = bytearray(b" ")
    return bytes(data)


def fuzz_files(cases, random, folder):
    """-> Counter of what became of the files. Raises whatever reading raises, and AssertionError for a silent loss."""
    counts, path = collections.Counter(), folder / "case"
    originals = {kind: make(RECORDS[:40]) for kind, make in KINDS.items()}
    for case in range(cases):
        kind = random.choice([*originals, "random"])
        data = mutate(originals[kind], random) if kind != "random" else random.randbytes(random.randrange(2000))
        path.write_bytes(data)
        problems = Problems()
        found = sum(1 for _ in read_records(str(path), problems))
        outcome = "refused" if problems.fatal else "in part" if problems.rejected else "read"
        assert found or outcome != "read", f"case {case} ({kind}): nothing read and nothing said"
        problems.report()
        counts[f"{kind}: {outcome}"] += 1
    return counts
