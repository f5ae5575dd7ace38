"""The exact integers: formats, one step and its inverse, fingerprints that prove it, and what it costs by theory."""
