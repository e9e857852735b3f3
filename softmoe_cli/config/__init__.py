"""Every option that exists: its type, its meaning and what values it may take."""
