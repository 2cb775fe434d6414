"""What clients ask, as they write it: checked before anything is computed."""
