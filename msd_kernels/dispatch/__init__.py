"""What every op shares: registration, autograd, checks of arguments, choice of backend."""
