"""Containers whose layers are steps, without capturing anything; and momentumnet's interface."""
