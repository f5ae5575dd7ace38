"""Doing it: the new graph, the code of its steps, and what lies between regions."""
