"""Where a simulated cohort's work is done. One file each; `inline` is the reference."""
