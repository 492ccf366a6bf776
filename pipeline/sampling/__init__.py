"""Sample order of an epoch, and substitutes for damaged records."""
