"""Many slides, on many machines: what is to be done, who does it, and what was done."""
