"""The doctor: looks at a folder of ours, and at what it depends on, and says what to do.

It changes nothing, and runs beside the program whose folder it is, or instead of it.
"""
