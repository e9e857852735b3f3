"""Checks the laws that every router must obey, and compares a router with the official code's numbers."""
