"""The parts of the report page, one file each; add a file and it appears."""
