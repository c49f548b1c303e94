"""The mathematics of the processes: how data becomes noise, what is learned, and how to go back.

Pure functions of arrays; no parameters. Time is the same everywhere: t=1 is noise, t=0 is data.
"""
