"""Values and decisions: no database, no network, no clock."""
