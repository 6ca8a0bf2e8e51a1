"""The artifact: its files, its manifest, and every check made before its code is loaded."""
