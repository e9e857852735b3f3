"""What every router must keep, measured; and the official code's numbers, compared."""
