"""See lm_eval."""
