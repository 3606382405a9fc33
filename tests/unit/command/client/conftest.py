"""What tests of the client share."""

import pytest

from tests.support.standin import standing_in


@pytest.fixture
def script():
    """A server that speaks by a script."""
    with standing_in() as running:
        yield running
