"""What stands in a graph in the place of a chain: a module that binds the steps of this moment and runs them on a tape."""
