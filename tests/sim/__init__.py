"""Sensors whose truth is known exactly. See README.md."""
