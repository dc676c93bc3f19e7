"""A stage that this project does not have: what it takes to add one."""
