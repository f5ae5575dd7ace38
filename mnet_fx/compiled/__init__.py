"""The backend of `torch.compile`: what becomes of Dynamo's graphs, through both doors."""
