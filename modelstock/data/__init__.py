"""From images on disk, or drawn, to shards, and from shards to examples."""
