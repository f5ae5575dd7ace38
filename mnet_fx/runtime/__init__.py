"""A chain forward and back, each step run again for its gradient, and what a rerun must see. Knows no graph and no model."""
