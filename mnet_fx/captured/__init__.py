"""A model whose forward Dynamo captures at its calls, or that is a GraphModule already."""
