"""Observers of a run in training: reports, trackers, previews, validation, profiles."""
