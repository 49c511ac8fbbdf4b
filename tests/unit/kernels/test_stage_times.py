"""The neighbours of a time, in the dtype of the state."""

import pytest
import torch

from node_cuda.kernels.stage_times import Clock


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("s", [0.0, 1.0, -1.0, 0.3, 1e-3, -0.7])
def test_the_neighbours_of_a_time_are_those_of_nextafter(s, dtype):
    clock, x = Clock(1.0, dtype, torch.device("cpu")), torch.tensor(s, dtype=dtype)
    assert torch.tensor(clock.after(s), dtype=dtype) == torch.nextafter(x, x + 1)
    assert torch.tensor(clock.before(s), dtype=dtype) == torch.nextafter(x, x - 1)


def test_the_neighbours_of_zero_in_half_precision_are_its_least_numbers():
    least = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    clock = Clock(1.0, torch.float16, torch.device("cpu"))
    assert (clock.before(0.0), clock.after(0.0)) == (-least, least)
