"""What a graph is: operations, writes to memory, dependencies, an order with regions."""
