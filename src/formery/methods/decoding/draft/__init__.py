"""A cheap guess, checked by the model itself: draft and verify."""
