"""Stands in for hypothesis where `make gpu` finds none on the machine: its tests are skipped, and say so; the others of their files run."""

from __future__ import annotations

from typing import Any

import pytest


class _Anything:
    """A strategy, and what makes one."""

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: object, **__: object) -> _Anything:
        return self

    def __or__(self, _: object) -> _Anything:
        return self


strategies = HealthCheck = _Anything()


def given(*_: object, **__: object) -> Any:
    """Skips the test, before pytest looks for fixtures of the names that hypothesis would draw."""
    return pytest.mark.skip(reason="hypothesis is not installed")


def settings(*_: object, **__: object) -> Any:
    """No settings."""
    return lambda test: test


def reject() -> None:
    """Never called."""
