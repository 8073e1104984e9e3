"""Adult census income: an office for each class of worker."""
