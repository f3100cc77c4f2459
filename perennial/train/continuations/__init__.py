"""Named ways of continuing: from a lineage, a shift, a budget and data to the stages of a recipe."""
