"""Code made from fedml.proto by `python -m fedml.protocol.generate`; never edited by hand."""
