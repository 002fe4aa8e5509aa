"""How guest code becomes host code: the binary-translation engine, one concept a file."""
