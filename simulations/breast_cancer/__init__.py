"""Breast cancer at five clinics with unlike patients."""
