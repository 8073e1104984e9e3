"""FedProx's synthetic(alpha, beta): sites that differ in their models and in their rows."""
