"""What looks at a run while it trains: reports, trackers, previews, validation, profiles."""
