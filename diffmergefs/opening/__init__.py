"""A chain becomes an image whose layers have been judged."""
