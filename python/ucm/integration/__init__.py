"""Plugs of UCM into inference engines."""
