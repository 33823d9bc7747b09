"""What a wrong option or file is answered with."""

from contextlib import contextmanager

import pytest

from multitask_kd.errors import UserError


@contextmanager
def says(*parts: str):
    """Expects a UserError whose message holds every part."""
    with pytest.raises(UserError) as raised:
        yield raised
    lacking = [part for part in parts if part not in str(raised.value)]
    assert not lacking, f"{lacking} is not in: {raised.value}"


@contextmanager
def begins(*parts: str):
    """Expects a UserError whose message holds every part and begins with the first."""
    with says(*parts) as raised:
        yield
    assert str(raised.value).startswith(parts[0]), f"'{parts[0]}' is not what begins: {raised.value}"
