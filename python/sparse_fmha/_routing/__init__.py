"""Calls of other attention functions that a model makes: as calls of this library, or measured."""
