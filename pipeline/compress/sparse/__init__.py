"""Which weights of a matrix go to zero: criteria, and methods that move the weights that stay as well."""
