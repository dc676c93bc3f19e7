"""Runs that were made, kept and compared.

line      what is kept of a check, bench, gate or faults run: one JSON object
store     lines in a file
compare   two runs: what got worse, what moved, what cannot be compared
view      the comparison for people; history, a picture over many runs
"""
