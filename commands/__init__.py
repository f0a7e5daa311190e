"""The commands of the `graphwright` command line: each takes parsed arguments and returns a `Result`."""
