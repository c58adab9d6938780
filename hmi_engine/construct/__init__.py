"""How an hPLM is made: PLOT materialisation and the training of tenants."""
