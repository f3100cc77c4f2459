"""What every other part stands on: settings, amounts, components, records, lineage. Imports no torch."""
