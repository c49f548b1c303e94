"""What a recipe's steps need on machines that are not here, from the compilers for them."""
