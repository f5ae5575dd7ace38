"""A chain forward and back, over `torch.utils.checkpoint`, and what a rerun must see. Knows no graph and no model."""
