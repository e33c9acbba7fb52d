"""Methods that change the feed-forward."""
