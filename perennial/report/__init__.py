"""Run folders to one self-contained HTML page: what an update gained, forgot and cost. Reads files only."""
