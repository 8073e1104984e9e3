"""Made by fedml.serving.generate; do not edit."""
