"""What fedml costs, beside what the same work costs at the least, measured in the same minute.

`python -m benchmarks [NAME ...] [--json] [--quick] [--list]` is the one door. A benchmark is a
function in a file of `benchmarks.cases`; to add one, add a file there.
"""
