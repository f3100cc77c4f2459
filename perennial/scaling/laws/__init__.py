"""One file per law: a formula, its coefficients with units and bounds, and where it was published."""
