"""One file for each command of `msee`: its arguments, and the call of what does the work."""
