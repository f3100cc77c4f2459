"""From text to batches: readers, filters, deduplication, prepared corpora, mixtures, order and loading. numpy only."""
