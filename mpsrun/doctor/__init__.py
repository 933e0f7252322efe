"""`mpsrun doctor`: whether this machine has what mpsrun needs, and how to fix what is missing."""
