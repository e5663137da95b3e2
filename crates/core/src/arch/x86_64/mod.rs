//! Vector implementations for x86-64.
