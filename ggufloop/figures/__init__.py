"""What matplotlib draws. Needs the extra lab."""
