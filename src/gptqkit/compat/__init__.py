"""Faces of other projects, so that scripts written for them run with only the import changed."""
