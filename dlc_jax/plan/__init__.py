"""Planning: what a recipe's steps need on machines that are not here, from the compiler that would serve them there."""
