"""This process as one of several: how it joins them, agrees with them, and ends with them.

Nothing here touches devices: what is said goes through the coordination service of process 0, so
it works while devices wait in a collective, and for as long as a process reads files.
"""
