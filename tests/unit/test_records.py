"""Copies of frozen dataclasses with some fields changed."""

from dataclasses import dataclass, replace

from node_cuda._records import with_fields


@dataclass(frozen=True)
class Pair:
    a: int
    b: int = 2


def test_a_copy_has_the_new_fields_and_the_others_and_leaves_the_record():
    record = Pair(1)
    assert with_fields(record, a=5) == replace(record, a=5) == Pair(5, 2)
    assert record == Pair(1)
