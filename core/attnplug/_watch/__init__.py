"""Who watches what runs: verification, metrics, summaries."""
