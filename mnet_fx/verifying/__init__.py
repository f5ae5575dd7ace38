"""`verify`: whether a rewritten network is right, on the user's own model and data."""
