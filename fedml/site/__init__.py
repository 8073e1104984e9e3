"""The site daemon: dials out, obeys its own policy, trains in a child process, keeps a ledger."""
