"""`decotrain run`: a script on this machine as one peer of a run, in one or several processes."""
