"""From AnnData to Arrow shards, and from shards to packed sentences of cells."""
