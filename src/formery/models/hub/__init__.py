"""Models that others publish, in the layouts that they publish them in."""
