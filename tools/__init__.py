"""Programs that keep the project's own files in step; not part of any installation."""
