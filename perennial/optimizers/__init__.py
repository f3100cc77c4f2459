"""Update rules, one per file; every parameter falls in exactly one group by its role."""
