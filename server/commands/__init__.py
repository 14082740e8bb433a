"""One module a command of `octavo`; `server/cli.py` has the table that leads here."""
