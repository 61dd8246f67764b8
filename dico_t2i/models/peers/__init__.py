"""Networks to compare with, under the same interface: docs/networks.md says which is whose code."""
