"""What to do with a graph: sums, chains, steps, rules, nesting."""
