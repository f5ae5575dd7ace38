"""How a graph is got: from what Dynamo hands over, as a preview without inputs; layouts brought to one."""
