"""From a trained model to a small file and back."""
