"""Methods that look into a trained model."""
