"""`lookup`: a method with its options, which are parsed once for the same content."""

import gc
import weakref

import pytest

from node_cuda import _parse_options
from node_cuda import options as opt
from node_cuda.methods.registry import lookup
from node_cuda.native.cache import NativeCache


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The options that were parsed."""
    calls: list[object] = []
    original = _parse_options.parse

    def counted(*arguments: object, **more: object) -> object:
        calls.append(arguments[2])
        return original(*arguments, **more)  # pyright: ignore

    monkeypatch.setattr(_parse_options, "parse", counted)
    return calls


def test_equal_options_are_parsed_once_although_the_dicts_are_different_objects(parsed: list[object]) -> None:
    first = lookup("dopri5", dict(max_step=0.123, throw=False))
    assert lookup("dopri5", dict(max_step=0.123, throw=False)) is first and len(parsed) == 1
    assert lookup("bosh3", dict(max_step=0.123, throw=False)) is not first


def test_a_changed_dict_is_parsed_again() -> None:
    options = dict(max_step=0.25)
    before = lookup("dopri5", options)
    options["max_step"] = 0.5
    after = lookup("dopri5", options)
    assert isinstance(before.options, opt.AdaptiveOptions) and isinstance(after.options, opt.AdaptiveOptions)
    assert before.options.max_step == 0.25 and after.options.max_step == 0.5


def test_true_is_not_taken_for_one() -> None:
    lookup("dopri5", dict(clip=True))
    with pytest.raises(TypeError, match="True or False; got 1"):
        lookup("dopri5", dict(clip=1))


def test_an_unknown_option_warns_each_time() -> None:
    for _ in range(2):
        with pytest.warns(UserWarning, match="Unexpected arguments"):
            lookup("dopri5", dict(hax=1))


def test_a_wrong_option_raises_each_time() -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="safety"):
            lookup("dopri5", dict(safety=-1.0))


def test_options_with_a_cache_of_compiled_solves_do_not_keep_it_alive(parsed: list[object]) -> None:
    cache = NativeCache()
    first = lookup("dopri5", dict(compile=cache))
    assert lookup("dopri5", dict(compile=cache)) is first and len(parsed) == 1
    assert lookup("dopri5", dict(compile=NativeCache())) is not first
    alive = weakref.ref(cache)
    del cache, first
    parsed.clear()
    gc.collect()
    assert alive() is None
