"""How much each weight matters: one score a file, one line each in the catalogue."""
