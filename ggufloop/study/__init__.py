"""Bits against loops: a ladder of files measured under loops, what that says, its report."""
