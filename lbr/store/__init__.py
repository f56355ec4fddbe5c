"""Where jobs live: one store, written once, with an engine for each kind of database."""
