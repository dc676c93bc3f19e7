"""The judge: it knows the stages and their references, and finds implementations by their spec only."""
