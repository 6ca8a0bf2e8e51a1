"""The command line of the compiler."""
