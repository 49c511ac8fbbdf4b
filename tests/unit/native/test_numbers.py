"""The vector of numbers of a call has a place for each number, and gives it back."""

from __future__ import annotations

import torch
from problems import F64

from node_cuda.kernels.reference import ControllerParams
from node_cuda.native.numbers import (
    FIRST,
    REALS,
    SECOND,
    Form,
    Point,
    Settings,
    given_in,
    packed,
    point_in,
    point_of,
    settings_in,
    settings_of_law,
)


def numbered(kind, first=0):
    return kind(*range(first, first + len(kind._fields)))


def test_a_point_and_the_settings_come_back_from_their_vectors():
    for kind, read in ((Point, point_in), (Settings, settings_in)):
        vector = torch.tensor(list(numbered(kind)), dtype=F64)
        found = read(vector)
        assert [float(x) for x in found] == list(numbered(kind))
        assert torch.equal(packed(found), vector)
    point = point_in(torch.arange(len(Point._fields), dtype=F64))
    assert all(x.dtype is F64 for x in point[:REALS]) and all(x.dtype is torch.int64 for x in point[REALS:])


def test_a_point_on_the_host_has_integers_for_counts():
    found = point_of([float(x) for x in numbered(Point)])
    assert found == numbered(Point)
    assert all(type(x) is int for x in found[REALS:]) and all(type(x) is float for x in found[:REALS])


def test_the_times_of_a_call_are_found_by_the_form():
    numbers = [*numbered(Point), *numbered(Settings, 100)]
    assert (len(Point._fields), len(numbers)) == (FIRST, SECOND)
    vector = torch.tensor([*numbers, 1, 2, 3, 4, 5, 6, 7], dtype=F64)
    found = given_in(Form(times=2, tstops=1, grid=4), vector)
    assert [float(x) for x in found.c] == list(numbered(Settings, 100))
    assert found.times.tolist() == [1, 2] and found.tstops.tolist() == [3] and found.grid.tolist() == [4, 5, 6, 7]
    assert found.jumps is None
    assert given_in(Form(times=7), vector).tstops is None


def test_a_controller_fills_its_part_of_the_settings():
    law = ControllerParams(
        (0.1, 0.2, 0.3), safety=0.7, ifactor=5.0, dfactor=0.4, keep=True, min_step=0.01, max_step=2.0
    )
    found = Settings(1.0, 1e-3, 1e-6)._replace(**settings_of_law(law))
    assert found[3:12] == (0.1, 0.2, 0.3, 0.7, 5.0, 0.4, 1.0, 0.01, 2.0)
