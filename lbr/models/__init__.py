"""Who answers: the protocol, the providers, a user's function and the offline model."""
