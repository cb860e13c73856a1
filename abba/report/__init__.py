"""Runs as pictures: one HTML page that needs no network."""
