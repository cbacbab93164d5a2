"""Updates of the weights: one per window or group of windows, and how to take one back."""
