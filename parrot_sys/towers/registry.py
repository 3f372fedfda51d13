"""The vision towers: a new one is a file beside this one and a line here."""

from __future__ import annotations

from parrot_sys.towers import clip, dinov2, efficientnet_lite0, siglip
from parrot_sys.towers.tower import Tower

TOWERS: dict[str, Tower] = {
    tower.name: tower
    for tower in (
        clip.TOWER,
        siglip.TOWER,
        dinov2.TOWER,
        efficientnet_lite0.TOWER,
    )
}
"""Name -> tower."""
