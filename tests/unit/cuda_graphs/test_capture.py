"""The checks before a capture, without a GPU: which fields cannot be captured. gpu/test_gpu_graphs.py has the rest."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from node_cuda.cuda_graphs import capture
from node_cuda.cuda_graphs.capture import GraphCapture, Uncapturable, Watch, first_cause

Y = torch.linspace(-1.0, 1.0, 8)
META = torch.device("meta")

REFUSED = {
    "a number": lambda y: y * y.sum().item(),
    "a condition": lambda y: -y if (y > 0).any() else y,
    "a comparison": lambda y: -y if torch.equal(y, y.abs()) else y,
    "a mask": lambda y: y + y[y > 0].sum(),
    "a size": lambda y: y + y.nonzero().sum(),
    "random numbers": lambda y: y * torch.rand(()),
    "a generator of its own": lambda y: y * torch.rand((), generator=torch.Generator()),
    "dropout": nn.functional.dropout,
}
FINE = {
    "arithmetic": lambda y: torch.sin(y) * 2.0 + torch.where(y > 0, y, 0.0),
    "dropout in evaluation": lambda y: nn.functional.dropout(y, training=False),
    "a mask that selects nothing to count": lambda y: y.masked_fill(y > 0, 0.0),
    "a number of the host's": lambda y: y * torch.tensor(2.0),
    "a gradient": lambda y: torch.autograd.grad(y.sin().sum(), y)[0],
    "a transform": lambda y: torch.func.vmap(torch.sin)(y.detach()),
}


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_waits_for_the_device_or_draws_is_refused_before_its_capture(field):
    with pytest.raises(Uncapturable, match=r"^func "), Watch(Y.device):
        REFUSED[field](Y)


@pytest.mark.parametrize("field", FINE)
def test_other_fields_are_not_refused(field):
    y = Y.clone().requires_grad_()
    expected = FINE[field](y)
    with Watch(Y.device):
        actual = FINE[field](y)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    "copy", [lambda x: x.to(META), lambda x: torch.empty_like(x, device=META).copy_(x)], ids=["to", "copy_"]
)
def test_copies_between_host_and_device_are_refused(copy):
    """Each replay would copy from the address of the numbers at the capture."""
    with pytest.raises(Uncapturable, match="between the host and the device"), Watch(META):
        copy(Y)
    with Watch(META):
        copy(torch.ones(3, device=META))


def warm_up(work) -> None:
    """Call `GraphCapture.warm_up` for a recorder without a device."""
    recorder = SimpleNamespace(
        device=Y.device,
        _random_states=lambda: [torch.get_rng_state().numpy().tobytes(), random.getstate()],
        _stream=SimpleNamespace(synchronize=lambda: None),
    )
    GraphCapture.warm_up(recorder, work)  # pyright: ignore[reportArgumentType]


def test_random_numbers_of_python_are_found_by_the_state_of_the_generator():
    with pytest.raises(Uncapturable, match="draws random numbers"):
        warm_up(lambda: Y * random.random())
    warm_up(lambda: Y.sin())


def test_a_field_that_the_check_cannot_run_is_left_to_the_capture():
    """The check itself may fail."""
    runs = []

    def work():
        runs.append(torch._C._len_torch_dispatch_stack() > 0)
        if runs[-1]:
            raise NotImplementedError("a mode is in the way")

    warm_up(work)
    assert runs == [False, False, True, False]


def test_the_streams_of_leaves_are_overridden_during_a_capture(monkeypatch):
    names = (torch.autograd.graph, "set_override_stale_capture_stream"), (torch._C, "_override_stale_capture_stream")
    assert hasattr(*names[0]) is hasattr(*names[1])
    now = []
    monkeypatch.setattr(*names[0], now.append, raising=False)
    monkeypatch.setattr(*names[1], lambda: now[-1], raising=False)
    for before in (False, True):
        now[:] = [before]
        with pytest.raises(KeyError), capture._streams_of_leaves_overridden():
            raise KeyError
        assert now == [before, True, before]


def test_the_reason_is_the_first_error_and_not_one_that_was_handled_before():
    def fail() -> None:
        try:
            raise ValueError("not permitted when stream is capturing.\nMore.")
        except ValueError as error:
            raise RuntimeError("a previous error during capture") from error

    try:
        raise KeyError("of the caller's")
    except KeyError as handled:
        with pytest.raises(RuntimeError) as failure:
            fail()
        assert first_cause(failure.value, handled) == "not permitted when stream is capturing"
