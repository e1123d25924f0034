"""The main job: a launcher, the peers it starts, a live table and a summary.

`launcher` and `cli` import no torch at the top, so that bad input is answered at once.
"""
