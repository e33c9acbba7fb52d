"""Methods that change who looks at whom."""
