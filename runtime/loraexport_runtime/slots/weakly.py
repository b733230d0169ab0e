"""A method that does not keep its object alive."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar
from weakref import WeakMethod

_P = ParamSpec("_P")
_T = TypeVar("_T")


def weakly(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """The method, without keeping its object alive: a host that is dropped goes at once, and does
    not wait for Python to look for the circle of a host and its slots."""
    reference = WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        target = reference()
        assert target is not None, "whoever calls comes by the object"
        return target(*args, **kwargs)

    return call
