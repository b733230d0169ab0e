"""Where conftest keeps the tests of a run before any is deselected."""

import pytest

COLLECTED = pytest.StashKey[list[pytest.Item]]()
