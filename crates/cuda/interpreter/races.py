"""Planted errors that the interpreter has to find."""
def cases(harness):
    return []
