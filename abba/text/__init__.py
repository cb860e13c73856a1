"""Text: one definition of prompts, masking and answer extraction, shared by training and scoring."""
