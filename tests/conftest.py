"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# Examples are small, but the machine may be busy with guests: how long one takes says nothing.
settings.register_profile("kata-py", deadline=None)
settings.load_profile("kata-py")
