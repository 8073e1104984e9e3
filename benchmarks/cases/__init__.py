"""The benchmarks themselves, one file a subject; each module here is found and loaded."""
