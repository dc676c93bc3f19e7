"""What the judge is worth: the kill matrix, and audits of other people's tests."""
