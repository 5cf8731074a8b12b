"""The executable specification: every op in plain PyTorch, exact enough to judge the others in float64."""
