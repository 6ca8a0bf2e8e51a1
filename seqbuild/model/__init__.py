"""The model that is compiled: where it comes from, its code, its checkpoint's names."""
