"""That nothing is missing in the repository of a guest: told by our own check, there with real fs-verity."""

from __future__ import annotations

import json

from hostimage_testing.emulator import Machine


def check_nothing_lost(guest: Machine) -> None:
    """All that deployments and tags need is there and right; nothing of it was collected."""
    found = json.loads(guest.run("hostimagectl", "--quiet", "verify", "--json", limit=600).out)
    assert found["result"]["damaged"] == 0, found
