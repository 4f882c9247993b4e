"""A run being recorded. Nothing here knows of joules."""
