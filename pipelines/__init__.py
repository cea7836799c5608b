"""Commands: argv -> configuration -> one call -> a table."""
